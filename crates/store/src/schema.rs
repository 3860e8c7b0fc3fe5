//! The schema of meta and its versions.

use crate::sql::Component;

pub(crate) static META: Component = Component {
    name: "meta",
    migrations: &MIGRATIONS,
    user_version: true,
    lock: i64::from_be_bytes(*b"\0\0\0\0meta"),
    exclusive: true,
    cache_kib: 8 << 10,
    checkpoint_pages: 1000,
    readers: 1,
};

/// One entry per version; entry n brings version n to n + 1. In SQLite's words, translated for PostgreSQL by `sql`.
const MIGRATIONS: [&str; 7] =
    [FIRST, SECOND, THIRD, FOURTH, crate::life::MIGRATION, crate::rollback::MIGRATION, crate::receipts::MIGRATION];

pub(crate) const FIRST: &str = "
    CREATE TABLE vm (
        id TEXT PRIMARY KEY,
        name TEXT NOT NULL UNIQUE,
        image TEXT NOT NULL,
        profile TEXT NOT NULL,
        intent TEXT NOT NULL,
        observed TEXT NOT NULL,
        launched INTEGER NOT NULL,
        pipeline TEXT,
        version INTEGER NOT NULL,
        created_s INTEGER NOT NULL
    ) STRICT;
    CREATE INDEX vm_pipeline ON vm (pipeline) WHERE pipeline IS NOT NULL;
    CREATE TABLE pipeline (
        id TEXT PRIMARY KEY,
        name TEXT NOT NULL,
        request TEXT NOT NULL,
        state TEXT NOT NULL,
        view TEXT NOT NULL,
        created_s INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE item (
        pipeline TEXT NOT NULL,
        path BLOB NOT NULL,
        entry TEXT NOT NULL,
        PRIMARY KEY (pipeline, path)
    ) STRICT, WITHOUT ROWID;
";

/// VMs that are started again.
const SECOND: &str = "
    ALTER TABLE vm ADD COLUMN starts INTEGER NOT NULL DEFAULT 0;
";

/// VMs that are clones of others.
const THIRD: &str = "
    ALTER TABLE vm ADD COLUMN source TEXT;
";

/// Substrates; and whose it is, where several servers could reach it.
const FOURTH: &str = "
    ALTER TABLE vm ADD COLUMN substrate TEXT;
    CREATE TABLE meta_identity (
        name TEXT PRIMARY KEY,
        value TEXT NOT NULL
    ) STRICT, WITHOUT ROWID;
";
