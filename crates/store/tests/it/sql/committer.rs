//! The thread that writes, on tables made for these tests.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::Duration,
};

use burgeon_api::{Error, ErrorKind};
use burgeon_store::sql::{Address, Component, Connection, Database, Value};

use super::{Home, on_both_engines, server::Server};

static NOTES: Component = Component {
    name: "notes",
    migrations: &["
        CREATE TABLE author (id INTEGER PRIMARY KEY) STRICT;
        CREATE TABLE note (
            id INTEGER PRIMARY KEY,
            text TEXT,
            author INTEGER REFERENCES author (id) DEFERRABLE INITIALLY DEFERRED,
            bytes BLOB
        ) STRICT;
    "],
    user_version: false,
    exclusive: false,
    lock: 7,
    cache_kib: 1024,
    checkpoint_pages: 100,
    readers: 1,
};

/// The same, after somebody wrote a migration that fails half-way.
static BROKEN: Component = Component {
    migrations: &[
        NOTES.migrations[0],
        "CREATE TABLE half (id INTEGER) STRICT; INSERT INTO half VALUES (1); INSERT INTO nowhere VALUES (1);",
    ],
    ..copy(&NOTES)
};

const fn copy(component: &Component) -> Component {
    Component { ..*component }
}

fn add(connection: &mut Connection, id: i64) -> Result<u64, Error> {
    connection.execute("INSERT INTO note (id, text) VALUES ($1, $2)", &[id.into(), "text".into()])
}

async fn count(database: &Database) -> i64 {
    database
        .read("count", |connection| connection.query("SELECT COUNT(*) FROM note", &[])?[0].integer(0))
        .await
        .unwrap()
}

on_both_engines! {
    a_refused_request_goes_alone,
    a_request_that_hides_a_failure_is_refused,
    a_failing_commit_is_told_to_all_of_its_group,
    reads_do_not_wait_behind_writes,
    values_come_back_as_they_went,
    parameters_go_by_their_numbers,
    a_migration_that_fails_leaves_nothing,
}

async fn a_refused_request_goes_alone(home: Home) {
    let database = Database::open(&home.address, &NOTES).unwrap();
    let tasks: Vec<_> = (0..60i64)
        .map(|id| {
            let database = database.clone();
            tokio::spawn(async move {
                let body = move |connection: &mut Connection| {
                    add(connection, id)?;
                    match id % 3 {
                        0 => Err(Error::conflict(format!("no {id}"))),
                        _ => Ok(id),
                    }
                };
                // Half of them in savepoints, half trusted.
                if id % 2 == 0 { database.write("add", body).await } else { database.write_trusted("add", body).await }
            })
        })
        .collect();
    for (id, task) in (0i64..).zip(tasks) {
        match task.await.unwrap() {
            Ok(kept) => assert!(kept == id && id % 3 != 0),
            Err(error) => assert_eq!(error.message, format!("add: no {id}")),
        }
    }
    assert_eq!(count(&database).await, 40);
}

async fn a_request_that_hides_a_failure_is_refused(home: Home) {
    let database = Database::open(&home.address, &NOTES).unwrap();
    let hide = |connection: &mut Connection| {
        add(connection, 1)?;
        drop(add(connection, 1));
        Ok(())
    };
    assert_eq!(database.write("hide", hide).await.unwrap_err().kind, ErrorKind::Internal);
    assert_eq!(database.write_trusted("hide", hide).await.unwrap_err().kind, ErrorKind::Internal);
    assert_eq!(count(&database).await, 0);
    database.write("add", |connection| add(connection, 1)).await.unwrap();
    let wrong = database.read("read", |connection| connection.query("SELECT nothing FROM nowhere", &[])).await;
    assert!(wrong.unwrap_err().message.contains("nowhere"));
    assert_eq!(count(&database).await, 1, "the reader goes on");
}

async fn a_failing_commit_is_told_to_all_of_its_group(home: Home) {
    let database = Database::open(&home.address, &NOTES).unwrap();
    // The first keeps the thread busy until the others wait, so that those are one group.
    let writer = database.clone();
    let busy = thread::spawn(move || {
        writer.blocking_write("wait", |_| {
            thread::sleep(Duration::from_millis(300));
            Ok(())
        })
    });
    tokio::time::sleep(Duration::from_millis(100)).await;
    let good = (0..5i64).map(|id| {
        let database = database.clone();
        tokio::spawn(async move { database.write("add", move |connection| add(connection, id)).await })
    });
    let good: Vec<_> = good.collect();
    let orphan =
        database.write("orphan", |connection| connection.execute("INSERT INTO note (id, author) VALUES (9, 9)", &[]));
    assert!(orphan.await.unwrap_err().message.to_lowercase().contains("foreign key"));
    for task in good {
        assert!(task.await.unwrap().is_err());
    }
    busy.join().unwrap().unwrap();
    assert_eq!(count(&database).await, 0);
    database.write("add", |connection| add(connection, 1)).await.unwrap();
}

async fn reads_do_not_wait_behind_writes(home: Home) {
    let database = Database::open(&home.address, &NOTES).unwrap();
    let writer = database.clone();
    let (begun, wait_begun) = std::sync::mpsc::channel();
    let (go_on, wait_go_on) = std::sync::mpsc::channel();
    let write = thread::spawn(move || {
        writer.blocking_write("slow", move |connection| {
            add(connection, 1)?;
            begun.send(()).unwrap();
            wait_go_on.recv_timeout(Duration::from_secs(30)).unwrap();
            Ok(())
        })
    });
    wait_begun.recv().unwrap();
    assert_eq!(count(&database).await, 0, "and it does not see what is not committed");
    go_on.send(()).unwrap();
    write.join().unwrap().unwrap();
    assert_eq!(count(&database).await, 1);
}

async fn values_come_back_as_they_went(home: Home) {
    let database = Database::open(&home.address, &NOTES).unwrap();
    let rows = vec![
        vec![Value::Integer(i64::MIN), "ünï\u{1f331}".into(), vec![0u8, 255].into()],
        vec![Value::Integer(i64::MAX), Value::Null, Value::Null],
        vec![Value::Integer(0), "".into(), Vec::new().into()],
    ];
    let expected = rows.clone();
    let insert = "INSERT INTO note (id, text, bytes) VALUES ($1, $2, $3)";
    let changed = database.write("add", move |connection| connection.execute_each(insert, &rows)).await.unwrap();
    assert_eq!(changed, [1, 1, 1]);
    let find = "SELECT id, text, bytes FROM note WHERE id = $1";
    let ids: Vec<_> = expected.iter().map(|row| vec![row[0].clone()]).collect();
    let found = database.read("find", move |connection| connection.query_each(find, &ids)).await.unwrap();
    assert_eq!(found.len(), 3);
    assert_eq!(found[0][0].integer(0).unwrap(), i64::MIN);
    assert_eq!((found[0][0].text(1).unwrap(), found[0][0].blob(2).unwrap()), ("ünï\u{1f331}", &[0u8, 255][..]));
    assert!(found[1][0].is_null(1) && found[1][0].is_null(2));
    assert_eq!((found[2][0].text(1).unwrap(), found[2][0].blob(2).unwrap()), ("", &[][..]));
    let wrong = database.write("add", |connection| {
        connection.execute("INSERT INTO note (id, text) VALUES ($1, $2)", &["text".into(), 7i64.into()])
    });
    assert!(wrong.await.is_err(), "text is no integer");
}

async fn parameters_go_by_their_numbers(home: Home) {
    let database = Database::open(&home.address, &NOTES).unwrap();
    database.write("add", |connection| add(connection, 1)).await.unwrap();
    let changed = database.write("change", |connection| {
        connection.execute("UPDATE note SET text = $2 WHERE id = $1 AND text <> $2", &[1i64.into(), "new".into()])
    });
    assert_eq!(changed.await.unwrap(), 1);
    let text = |connection: &mut Connection| {
        Ok(connection.query_first("SELECT text FROM note", &[])?.unwrap().text(0)?.to_string())
    };
    assert_eq!(database.read("find", text).await.unwrap(), "new");
}

async fn a_migration_that_fails_leaves_nothing(home: Home) {
    for _ in 0..2 {
        let error = Database::open(&home.address, &BROKEN).unwrap_err();
        assert!(error.message.contains("nowhere"), "{error}");
    }
    let database = Database::open(&home.address, &NOTES).unwrap();
    database.write("add", |connection| add(connection, 1)).await.unwrap();
    drop(database);
    assert!(Database::open(&home.address, &BROKEN).is_err());
    let database = Database::open(&home.address, &NOTES).unwrap();
    assert_eq!(count(&database).await, 1);
    let half = database.read("look", |connection| connection.query("SELECT * FROM half", &[])).await;
    assert!(half.is_err(), "no half of a migration stays");
}

#[test]
fn a_serialization_failure_is_repeated() {
    let home = Home::postgres();
    let database = Database::open(&home.address, &NOTES).unwrap();
    let runs = Arc::new(AtomicU32::new(0));
    let counted = runs.clone();
    let outcome = database.blocking_write("add", move |connection| {
        add(connection, 1)?;
        if counted.fetch_add(1, Ordering::Relaxed) < 3 {
            connection.execute("DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '40001'; END $$", &[])?;
        }
        Ok(7)
    });
    assert_eq!(outcome.unwrap(), 7);
    assert_eq!(runs.load(Ordering::Relaxed), 4);
}

#[test]
fn a_lost_server_is_found_again() {
    let mut server = Server::new();
    let address: Address = server.new_database();
    let database = Database::open(&address, &NOTES).unwrap();
    let add_blocking = |id: i64| database.blocking_write("add", move |connection| add(connection, id));
    add_blocking(1).unwrap();

    // A connection that the server closed, unseen until it is used.
    drop(server.run("postgres", "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname LIKE 'test%'"));
    add_blocking(2).unwrap();
    let count = |connection: &mut Connection| connection.query("SELECT COUNT(*) FROM note", &[])?[0].integer(0);
    assert_eq!(database.blocking_read("count", count).unwrap(), 2);

    // A server that crashes and is back soon.
    server.stop();
    let writer = database.clone();
    let waiting = thread::spawn(move || writer.blocking_write("add", |connection| add(connection, 3)));
    thread::sleep(Duration::from_millis(300));
    server.start();
    waiting.join().unwrap().unwrap();
    assert_eq!(database.blocking_read("count", count).unwrap(), 3);

    // One that stays away: told after a while, and found again later.
    server.stop();
    let error = add_blocking(4).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Unavailable);
    assert!(error.hint.is_some(), "{error}");
    assert_eq!(database.blocking_read("count", count).unwrap_err().kind, ErrorKind::Unavailable);
    server.start();
    add_blocking(4).unwrap();
    assert_eq!(database.blocking_read("count", count).unwrap(), 4);
}

#[test]
fn a_commit_that_is_cut_off_has_an_unknown_outcome() {
    let server = Server::new();
    let (name, address) = server.new_named_database();
    let database = Database::open(&address, &NOTES).unwrap();
    // The connection ends while its commit runs: the check at the end of the transaction does it.
    let trap = "
        CREATE FUNCTION cut() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN IF NEW.text = 'cut' THEN PERFORM pg_terminate_backend(pg_backend_pid()); END IF; RETURN NULL; END $$;
        CREATE CONSTRAINT TRIGGER cut AFTER INSERT ON note DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION cut();";
    server.run(&name, trap).unwrap();
    let runs = Arc::new(AtomicU32::new(0));
    let counted = runs.clone();
    let error = database.blocking_write("add", move |connection| {
        counted.fetch_add(1, Ordering::Relaxed);
        connection.execute("INSERT INTO note (id, text) VALUES (1, 'cut')", &[])
    });
    let error = error.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Unavailable);
    assert!(error.message.contains("outcome unknown"), "{error}");
    assert_eq!(runs.load(Ordering::Relaxed), 1, "only the asker may ask again");
    database.blocking_write("add", |connection| add(connection, 1)).unwrap();
}
