//! What is told of a database that cannot be used.

use burgeon_api::ErrorKind;
use burgeon_store::{catalog::Catalog, meta::Meta, sql::Address};
use rusqlite::Connection;

use super::{Home, meta::row, on_both_engines, server};

on_both_engines!(two_components_share_a_database, many_open_at_once);

async fn two_components_share_a_database(home: Home) {
    let meta = Meta::open(&home.address).unwrap();
    assert_eq!(Catalog::open(&home.address).unwrap().packs().await.unwrap(), []);
    meta.create_vm(row("web")).await.unwrap();
    drop(meta);
    assert_eq!(Meta::open(&home.address).unwrap().vms().await.unwrap().len(), 1);
}

async fn many_open_at_once(home: Home) {
    let open = |_| {
        let address = home.address.clone();
        std::thread::spawn(move || Catalog::open(&address).map(drop))
    };
    for opened in (0..8).map(open).collect::<Vec<_>>() {
        opened.join().unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_file_of_before_the_table_of_versions_is_read() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("meta.db");
    let web = {
        let meta = Meta::open(path.as_path()).unwrap();
        meta.create_vm(row("web")).await.unwrap()
    };
    let bare = Connection::open(&path).unwrap();
    assert_eq!(bare.query_row("PRAGMA user_version", [], |row| row.get::<_, i64>(0)).unwrap(), 7);
    bare.execute_batch("DROP TABLE schema_version").unwrap();
    drop(bare);
    for _ in 0..2 {
        let vms = Meta::open(path.as_path()).unwrap().vms().await.unwrap();
        assert_eq!(vms, std::slice::from_ref(&web));
    }
    let bare = Connection::open(&path).unwrap();
    let version = bare.query_row("SELECT version FROM schema_version WHERE component = 'meta'", [], |row| row.get(0));
    assert_eq!(version, Ok(7i64));
}

#[test]
fn a_newer_schema_is_refused_by_name_and_number() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("meta.db");
    drop(Meta::open(path.as_path()).unwrap());
    Connection::open(&path).unwrap().pragma_update(None, "user_version", 99).unwrap();
    let error = Meta::open(path.as_path()).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Refused);
    assert!(error.message.contains("meta has schema version 99"), "{error}");

    let path = directory.path().join("catalog.db");
    drop(Catalog::open(path.as_path()).unwrap());
    Connection::open(&path).unwrap().execute("UPDATE schema_version SET version = 98", []).unwrap();
    let error = Catalog::open(path.as_path()).unwrap_err();
    assert!(error.message.contains("catalog has schema version 98"), "{error}");

    let (name, address) = server::shared().new_named_database();
    drop(Meta::open(&address).unwrap());
    server::shared().run(&name, "UPDATE schema_version SET version = 97").unwrap();
    let error = Meta::open(&address).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Refused);
    assert!(error.message.contains("meta has schema version 97"), "{error}");
}

#[test]
fn what_is_no_database_of_ours_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let junk = directory.path().join("junk");
    std::fs::write(&junk, vec![7; 5000]).unwrap();
    assert_eq!(Meta::open(junk.as_path()).unwrap_err().kind, ErrorKind::Damaged);
    assert_eq!(std::fs::read(&junk).unwrap(), vec![7; 5000]);

    let other = directory.path().join("other.db");
    Connection::open(&other).unwrap().execute_batch("CREATE TABLE song (title TEXT)").unwrap();
    let error = Meta::open(other.as_path()).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Refused);
    assert!(error.message.contains("something else") && error.hint.is_some(), "{error}");

    let error = Meta::open(directory.path().join("no/meta.db").as_path()).unwrap_err();
    assert!(error.hint.unwrap().contains("directory exists"));

    let (name, address) = server::shared().new_named_database();
    server::shared().run(&name, "CREATE TABLE pipeline (oil TEXT)").unwrap();
    let error = Meta::open(&address).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Refused, "{error}");
    // Nothing of the migration stays: the table before it in the same transaction neither.
    assert!(server::shared().run(&name, "SELECT * FROM vm").is_err());
    assert!(server::shared().run(&name, "SELECT * FROM schema_version").is_err());
}

#[test]
fn a_server_that_cannot_be_used_is_told_with_the_next_step() {
    let missing = server::shared().text("nowhere").parse::<Address>().unwrap();
    let error = Meta::open(&missing).unwrap_err();
    assert_eq!(error.kind, ErrorKind::NotFound);
    assert_eq!(error.hint.unwrap(), "create it: createdb nowhere");

    let nobody = "host=/nonexistent user=ann dbname=burgeon".parse::<Address>().unwrap();
    let error = Meta::open(&nobody).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Unavailable);
    assert!(error.message.contains("/nonexistent"), "{error}");

    let server = server::Server::new();
    server.run("postgres", "CREATE USER ann PASSWORD 'right'").unwrap();
    server.set_access("local all burgeon trust\nlocal all ann scram-sha-256\n");
    for password in ["", " password=wrong"] {
        let text = format!("{}{password}", server.text("postgres").replace("user=burgeon", "user=ann"));
        let error = Meta::open(text.parse::<Address>().unwrap()).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Refused, "{error}");
        assert!(error.hint.as_ref().unwrap().contains("password"), "{error:?}");
        assert!(!error.message.contains("wrong"), "{error}");
    }
    let text = format!("{} password=right", server.text("postgres").replace("user=burgeon", "user=ann"));
    let error = Meta::open(text.parse::<Address>().unwrap()).unwrap_err();
    assert!(error.hint.as_ref().unwrap().contains("OWNER"), "no right to make tables: {error:?}");
}
