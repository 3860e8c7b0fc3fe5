//! A server whose packs are in a bucket, and whose catalog and meta are on PostgreSQL.

use std::{
    fs,
    io::Write,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::Stdio,
    time::{Duration, SystemTime},
};

use crate::{
    image_travels::{disk, import},
    lab::{Lab, is_running, kill, until},
    postgres,
    s3_server::Server as S3,
};

/// A lab whose server has nothing of its store in its data directory.
fn lab(s3: &S3, database: &str) -> Lab {
    let mut lab = Lab::new(&[]);
    lab.environment = environment(&lab, s3, database);
    lab
}

fn environment(lab: &Lab, s3: &S3, database: &str) -> Vec<(String, String)> {
    let secret = lab.file("secret", "secret\n");
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
    let pairs = [
        ("BURGEON_OBJECTS", "s3://burgeon/of/a-server"),
        ("BURGEON_DATABASE", database),
        ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY_FILE", secret.to_str().unwrap()),
        ("AWS_ENDPOINT_URL", &format!("http://127.0.0.1:{}", s3.port)),
    ];
    pairs.iter().map(|(name, value)| ((*name).to_string(), (*value).to_string())).collect()
}

fn set(lab: &mut Lab, name: &str, value: &str) {
    lab.environment.retain(|(known, _)| known != name);
    if !value.is_empty() {
        lab.environment.push((name.into(), value.into()));
    }
}

fn kill_servers(lab: &Lab) {
    for kind in ["serve", "control", "host"] {
        let pid = lab.pid(kind);
        kill(pid, "KILL");
        until("it has ended", || !is_running(pid));
    }
}

/// What lies plain of images and disks on this machine.
fn remove_cache(lab: &Lab) -> usize {
    let cached = fs::read_dir(lab.data().join("store/cache")).unwrap().flatten();
    let removed = cached.filter(|entry| !entry.file_name().to_string_lossy().starts_with('.'));
    removed.map(|entry| fs::remove_file(entry.path()).unwrap()).count()
}

/// Objects are as old as a collection wants them.
fn age(folder: &Path) {
    for entry in fs::read_dir(folder).unwrap().flatten() {
        if entry.path().is_dir() {
            age(&entry.path());
        } else {
            let file = fs::File::options().append(true).open(entry.path()).unwrap();
            file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000)).unwrap();
        }
    }
}

fn assert_sound(lab: &Lab) {
    for check in ["fsck", "scrub"] {
        let checked = lab.json(&["store", check]);
        assert!(checked["problems"].as_array().unwrap().is_empty(), "{check}: {checked}");
    }
}

#[test]
fn a_vm_lives_on_a_bucket_and_a_database() {
    let (mut s3, mut server) = (S3::start(), postgres::Server::new());
    let (name, _) = server.new_named_database();
    let home = Lab::new(&["debian-minimal"]);
    let remote = home.path("remote");
    home.run(&["image", "push", "debian-minimal", remote.to_str().unwrap()]).good();

    let lab = lab(&s3, &server.text(&name));
    lab.run(&["image", "pull", remote.to_str().unwrap(), "debian-minimal"]).good();
    for (file, elsewhere) in
        [("store/catalog.db", true), ("store/packs", true), ("meta.db", true), ("places.json", false)]
    {
        assert_eq!(lab.data().join(file).exists(), !elsewhere, "{file}");
    }
    lab.vm("debian-minimal", "one", "worker");
    let shell = |script: &str| lab.run(&["exec", "one", "--", "sh", "-c", script]);
    let sum = "cd /root && echo 3 > /proc/sys/vm/drop_caches && cat word noise /usr/bin/perl | sha256sum";
    shell("cd /root && echo acknowledged > word && head -c 8M /dev/urandom > noise && sync").good();
    lab.run(&["vm", "disk", "snapshot", "one", "first"]).good();
    let before = shell(sum).good().stdout;
    until("the snapshot is stored", || lab.json(&["vm", "disk", "ls", "one"])[0]["snapshots"][0]["stored"] == true);

    // Everything of it on this machine is gone, and its server with it.
    kill_servers(&lab);
    assert!(remove_cache(&lab) > 0);
    let is_adopted = |times: u64| {
        let view = lab.json(&["vm", "show", "one"]);
        view["state"] == "running" && view["on_host"]["adoptions"] == times
    };
    until("the VM is adopted", || is_adopted(1));
    assert_eq!(shell(sum).good().stdout, before);

    // The next host process begins while the bucket is away: the guest waits, and is found again.
    s3.stop();
    let host = lab.pid("host");
    kill(host, "KILL");
    remove_cache(&lab);
    until("another host process serves", || lab.pid("host") != host);
    until("the VM is looked for", || lab.json(&["vm", "show", "one"])["state"] == "unknown");
    s3.start_again();
    until("the VM is adopted again", || is_adopted(2));

    // The bucket goes away while the guest reads.
    remove_cache(&lab);
    kill(lab.pid("host"), "KILL");
    until("the VM is adopted once more", || is_adopted(3));
    s3.stop();
    let reading = lab.command(&["exec", "one", "--", "sh", "-c", sum]).spawn().unwrap();
    until("a read waits", || fs::read_to_string(lab.data().join("serve.log")).unwrap().contains("read waits for it"));
    s3.start_again();
    assert_eq!(crate::lab::finish(reading).good().stdout, before);
    let said = shell("dmesg | grep -iE 'i/o error|EXT4-fs error'");
    assert_eq!((said.code, said.stdout.as_str()), (1, ""));

    // The database is restarted under the server: what was acknowledged is there, and work goes on.
    let patient = ["exec", "one", "--", "sh", "-c", &format!("read go; {sum}")];
    let mut reading = lab.command(&patient).stdin(Stdio::piped()).spawn().unwrap();
    let mut go = reading.stdin.take().unwrap();
    until("the command runs", || shell("pgrep -f 'read go' | grep -v $$").code == 0);
    server.stop();
    go.write_all(b"\n").unwrap();
    let refused = lab.run(&["vm", "create", "debian-minimal", "--name", "two"]);
    assert!(refused.code == 1 && refused.stderr.contains("PostgreSQL"), "{refused:?}");
    server.start();
    // What the guest needed meanwhile and was not on this machine came late.
    assert_eq!(crate::lab::finish(reading).good().stdout, before);
    until("meta is there again", || lab.run(&["vm", "show", "one"]).code == 0);
    lab.run(&["vm", "disk", "snapshot", "one", "second"]).good();

    // What nothing keeps goes from the bucket, and the rest stays.
    let packs = s3.root.path().join("burgeon/of/a-server/packs");
    import(&lab, "gone", &disk());
    lab.run(&["image", "rm", "gone"]).good();
    let hours_ago = "touched_us = touched_us - 36000000000";
    for change in [
        format!("chunk SET {hours_ago}"),
        "pack SET created_us = created_us - 36000000000".into(),
        "root SET created_us = created_us - 36000000000".into(),
    ] {
        server.run(&name, &format!("UPDATE {change}")).unwrap();
    }
    age(&packs);
    let collected = lab.json(&["store", "gc"]);
    assert!(collected["packs_dropped"].as_u64().unwrap() >= 1, "{collected}");
    assert_sound(&lab);
    assert!(lab.json(&["store", "stat"])["chunks"].as_u64().unwrap() > 1000);
    assert_eq!(shell(sum).good().stdout, before);

    // The catalog is lost, and made anew of the bucket and of what this machine names.
    lab.run(&["vm", "stop", "--force", "one"]).good();
    kill_servers(&lab);
    server.run(&name, "DELETE FROM chunk; DELETE FROM pack; DELETE FROM root; DELETE FROM store_identity").unwrap();
    let refused = lab.run(&["ps"]);
    assert!(refused.code == 1 && refused.stderr.contains("is lost"), "{refused:?}");
    let rebuilt = lab.json(&["store", "fsck", "--rebuild"]);
    assert_eq!(rebuilt["roots_lost"], 0, "{rebuilt}");
    assert_sound(&lab);
    remove_cache(&lab);
    lab.run(&["vm", "start", "one"]).good();
    assert_eq!(shell(sum).good().stdout, before);
    lab.run(&["vm", "rm", "one"]).good();
}

#[test]
fn settings_that_cannot_be_right_are_refused_by_name() {
    let (s3, server) = (S3::start(), postgres::Server::new());
    let (name, _) = server.new_named_database();
    let mut lab = lab(&s3, &server.text(&name));
    lab.run(&["ps"]).good();
    import(&lab, "one", &disk());
    let shown = lab.run(&["config", "show"]).good().stdout;
    assert!(
        shown.contains("s3://burgeon/of/a-server") && shown.contains(&format!("PostgreSQL database {name}")),
        "{shown}"
    );
    assert!(!shown.contains("secret\n"), "{shown}");
    lab.run(&["doctor"]).good();

    // A copy of the data directory, while its server runs.
    let copy = lab.path("copy");
    fs::create_dir_all(&copy).unwrap();
    for file in ["burgeon-data", "places.json"] {
        fs::copy(lab.data().join(file), copy.join(file)).unwrap();
    }
    let second = crate::lab::finish(lab.command_in(&copy, &["ps"]).spawn().unwrap());
    assert!(
        second.code == 1 && second.stderr.contains("in use by another server: burgeon meta, process"),
        "{second:?}"
    );
    // Another one of its own.
    let other = crate::lab::finish(lab.command_in(&lab.path("other"), &["ps"]).spawn().unwrap());
    assert!(other.code == 1, "{other:?}");
    kill_servers(&lab);
    let other = crate::lab::finish(lab.command_in(&lab.path("other"), &["ps"]).spawn().unwrap());
    assert!(other.code == 1 && other.stderr.contains("is that of another server:"), "{other:?}");

    let right = lab.environment.clone();
    let secret = lab.file("wrong", "hidden");
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
    let open = lab.file("open", "hidden");
    server.run("postgres", "CREATE USER ann PASSWORD 'right'").unwrap();
    server.set_access("local all burgeon trust\nlocal all ann scram-sha-256\n");
    let of_ann =
        |password: &str| format!("{} password={password}", server.text(&name).replace("user=burgeon", "user=ann"));
    let nowhere = server.text("nowhere");
    let gone = format!("host={} user=burgeon dbname=x", lab.path("gone").display());
    for (changes, told) in [
        (vec![("AWS_SECRET_ACCESS_KEY_FILE", secret.to_str().unwrap())], "check access key and secret key"),
        (vec![("AWS_SECRET_ACCESS_KEY_FILE", open.to_str().unwrap())], "chmod 600"),
        (vec![("AWS_SECRET_ACCESS_KEY_FILE", "")], "AWS_SECRET_ACCESS_KEY"),
        (vec![("BURGEON_OBJECTS", "s3://missing/of/a-server")], "create the bucket missing"),
        (vec![("BURGEON_OBJECTS", "s3://burgeon/empty")], "another store"),
        (vec![("BURGEON_OBJECTS", "")], "set BURGEON_OBJECTS as it was"),
        (vec![("BURGEON_DATABASE", "")], "set BURGEON_DATABASE as it was"),
        (vec![("BURGEON_DATABASE", of_ann("hidden").as_str())], "check user and password"),
        (vec![("BURGEON_DATABASE", nowhere.as_str())], "createdb nowhere"),
        (vec![("BURGEON_DATABASE", gone.as_str())], "check that the PostgreSQL server runs"),
        (vec![("AWS_ENDPOINT_URL", "http://127.0.0.1:9")], "http://127.0.0.1:9 can be reached"),
    ] {
        for (variable, value) in changes {
            set(&mut lab, variable, value);
        }
        let done = lab.run(&["ps"]);
        assert!(done.code == 1 && done.stderr.contains(told), "{told}: {done:?}");
        let doctor = lab.run(&["doctor"]);
        assert!(!format!("{doctor:?}{done:?}").contains("hidden"), "{doctor:?}");
        // What only a comparison of both tells is for the server alone.
        if told != "another store" {
            assert!(doctor.code == 1 && doctor.stdout.contains(told), "{told}: {doctor:?}");
        }
        lab.environment.clone_from(&right);
    }
    let log = fs::read_to_string(lab.data().join("serve.log")).unwrap();
    assert!(!log.contains("hidden"), "{log}");
    // None of that changed anything.
    lab.run(&["image", "verify", "one"]).good();
    assert_sound(&lab);

    // What is in a data directory is not left behind there.
    let local = Lab::new(&[]);
    import(&local, "here", &disk());
    kill_servers(&local);
    let left = crate::lab::finish(lab.command_in(&local.data(), &["ps"]).spawn().unwrap());
    assert!(left.code == 1 && left.stderr.contains("is in") && left.stderr.contains("BURGEON_"), "{left:?}");
    local.run(&["image", "verify", "here"]).good();
}

#[test]
fn a_store_moves_with_its_vms() {
    let (s3, server) = (S3::start(), postgres::Server::new());
    let (name, _) = server.new_named_database();
    let mut lab = Lab::new(&["debian-minimal"]);
    lab.vm("debian-minimal", "one", "worker");
    let shell = |lab: &Lab, script: &str| lab.run(&["exec", "one", "--", "sh", "-c", script]).good().stdout;
    shell(&lab, "echo kept > /root/word; sync");
    lab.run(&["vm", "disk", "snapshot", "one", "first"]).good();
    shell(&lab, "echo and this > /root/other; sync");
    let words = lab.environment.clone();
    lab.environment = environment(&lab, &s3, &server.text(&name));
    let busy = lab.run(&["store", "move"]);
    assert!(busy.code == 1 && busy.stderr.contains("stop the server first"), "{busy:?}");
    // The VM goes on, and waits for its disk where it needs it.
    kill_servers(&lab);
    let moved = lab.json(&["store", "move"]);
    assert!(moved["packs"].as_u64().unwrap() >= 4 && moved["rows"].as_u64().unwrap() > 7000, "{moved}");
    assert!(!lab.data().join("store/packs").exists() && lab.data().join("meta.db.moved").exists());
    remove_cache(&lab);
    until("the VM is adopted", || lab.json(&["vm", "show", "one"])["on_host"]["adoptions"] == 1);
    assert_eq!(shell(&lab, "echo 3 > /proc/sys/vm/drop_caches; cat /root/word /root/other"), "kept\nand this\n");
    assert_eq!(lab.json(&["vm", "disk", "ls", "one"])[0]["snapshots"][0]["name"], "first");
    assert_sound(&lab);
    kill_servers(&lab);
    let right = std::mem::replace(&mut lab.environment, words);
    let forgotten = lab.run(&["ps"]);
    assert!(forgotten.code == 1 && forgotten.stderr.contains("set BURGEON_OBJECTS as it was"), "{forgotten:?}");
    lab.environment = right;
    lab.run(&["vm", "rm", "one"]).good();
}
