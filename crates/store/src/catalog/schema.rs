//! The schema of the catalog and its versions.

use crate::sql::Component;

pub(super) static CATALOG: Component = Component {
    name: "catalog",
    migrations: &MIGRATIONS,
    user_version: false,
    lock: i64::from_be_bytes(*b"\0catalog"),
    exclusive: false,
    // Chunks come in the order of their hashes, so that every group of them touches pages all over the table. A large
    // cache and a long log write such a page to the file once for many groups.
    cache_kib: 64 << 10,
    checkpoint_pages: 16_384,
    readers: 2,
};

/// One entry per version; entry n brings version n to n + 1. In SQLite's words, translated for PostgreSQL by `sql`.
const MIGRATIONS: [&str; 3] = [
    "
    CREATE TABLE pack (
        id BLOB PRIMARY KEY,
        length INTEGER NOT NULL,
        state TEXT NOT NULL,
        created_us INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE chunk (
        id BLOB PRIMARY KEY,
        pack BLOB NOT NULL,
        position INTEGER NOT NULL,
        stored INTEGER NOT NULL,
        length INTEGER NOT NULL,
        kind INTEGER NOT NULL,
        touched_us INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE root (
        kind TEXT NOT NULL,
        name TEXT NOT NULL,
        map BLOB NOT NULL,
        created_us INTEGER NOT NULL,
        expires_us INTEGER,
        note TEXT NOT NULL,
        PRIMARY KEY (kind, name)
    ) STRICT, WITHOUT ROWID;
",
    "
    CREATE TABLE counter (
        name TEXT PRIMARY KEY,
        value INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
    INSERT INTO counter VALUES ('roots set', 0);
    INSERT INTO counter VALUES ('removals', 0);
    CREATE TABLE gone (
        id BLOB PRIMARY KEY
    ) STRICT, WITHOUT ROWID;
",
    "
    CREATE TABLE store_identity (
        name TEXT PRIMARY KEY,
        value TEXT NOT NULL
    ) STRICT, WITHOUT ROWID;
",
];
