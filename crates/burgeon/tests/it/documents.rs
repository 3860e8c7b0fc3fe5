//! What the repository says equals what the code does.

use std::{collections::BTreeMap, fs, path::PathBuf};

use crate::lab::{Lab, until};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..")
}

#[test]
fn committed_schemas_equal_the_generated() {
    let lab = Lab::new(&[]);
    for (what, file) in [
        ("openapi", "docs/openapi.json"),
        ("recipe", "docs/schema/recipe.json"),
        ("pipeline", "docs/schema/pipeline.json"),
        ("profile", "docs/schema/profile.json"),
        ("report", "docs/schema/report.json"),
    ] {
        let generated = lab.run(&["schema", what]).good().stdout;
        let committed = fs::read_to_string(root().join(file)).unwrap_or_default();
        assert!(committed == generated, "{file} is stale: burgeon schema {what} > {file}");
    }
}

#[test]
fn imports_run_as_the_architecture_says() {
    let page = fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let block = page.split("```imports").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
    let told: BTreeMap<String, Vec<String>> = block
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(name, list)| {
            let mut list: Vec<String> = list.split_whitespace().map(ToString::to_string).collect();
            list.sort();
            (name.trim().to_string(), list)
        })
        .collect();
    let mut found = BTreeMap::new();
    let crates = fs::read_dir(root().join("crates")).unwrap().map(|entry| entry.unwrap().path());
    for path in crates.chain([root().join("bench")]) {
        let manifest = fs::read_to_string(path.join("Cargo.toml")).unwrap();
        let section = manifest.split("[dependencies]").nth(1).unwrap_or_default();
        let section = section.split("\n[").next().unwrap();
        let mut imports: Vec<String> = section
            .lines()
            .filter_map(|line| line.strip_prefix("burgeon-"))
            .map(|rest| rest.split(['.', ' ', '=']).next().unwrap().to_string())
            .collect();
        imports.sort();
        found.insert(path.file_name().unwrap().to_str().unwrap().to_string(), imports);
    }
    assert_eq!(told, found);
}

#[test]
fn dependencies_stay_few() {
    let lock = fs::read_to_string(root().join("Cargo.lock")).unwrap();
    let count = lock.matches("[[package]]").count();
    assert!(count <= 350, "{count} packages in Cargo.lock; 350 are agreed at this stage, 650 ever");
}

#[test]
fn every_verb_has_help_and_a_manual_page() {
    let lab = Lab::new(&[]);
    lab.run(&["man", lab.path("man").to_str().unwrap()]).good();
    for noun in ["vm", "image", "pipeline"] {
        assert!(lab.path(&format!("man/burgeon-{noun}.1")).exists(), "{noun}");
        assert!(lab.run(&[noun, "--help"]).good().stdout.contains("Commands:"));
    }
    for shell in ["bash", "zsh", "fish"] {
        assert!(lab.run(&["completions", shell]).good().stdout.contains("burgeon"));
    }
}

#[test]
fn settings_are_the_servers_where_one_runs() {
    let lab = Lab::new(&[]);
    let find = |settings: &serde_json::Value, name: &str| {
        settings.as_array().unwrap().iter().find(|setting| setting["name"] == name).cloned().unwrap()
    };
    let before = lab.run(&["config", "show", "-o", "json"]);
    assert!(before.stderr.contains("No server runs"), "{before:?}");
    let before = before.json();
    assert_eq!((&find(&before, "data")["from"], &find(&before, "data")["set_by"]), (&"flag".into(), &"--data".into()));
    assert_eq!(find(&before, "accelerator")["from"], "environment");
    assert_eq!(find(&before, "debian archive")["from"], "default");
    assert!(!lab.data().join("control.sock").exists(), "looking starts no server");

    let started = lab.command(&["ps"]).env("BURGEON_LOG", "warn").spawn().unwrap();
    crate::lab::finish(started).good();
    // The control process may answer before the host process does.
    until("both processes tell of themselves", || {
        lab.json(&["config", "show"]).as_array().unwrap().iter().any(|setting| setting["name"] == "accelerator")
    });
    // What this command's environment says does not matter.
    let asked = lab.command(&["-o", "json", "config", "show"]).env("BURGEON_ACCEL", "kvm").spawn().unwrap();
    let asked = crate::lab::finish(asked);
    assert!(!asked.stderr.contains("No server"), "{asked:?}");
    let asked = asked.json();
    for (name, value, set_by) in
        [("log", "warn", "BURGEON_LOG"), ("accelerator", "tcg", "BURGEON_ACCEL"), ("idle exit", "1m", "--idle-exit")]
    {
        let setting = find(&asked, name);
        let told = (&setting["value"], &setting["from"], &setting["set_by"]);
        assert_eq!(told, (&value.into(), &"server".into(), &set_by.into()), "{asked}");
    }
    assert!(find(&asked, "accelerator in use")["value"].as_str().unwrap().starts_with("tcg: "), "{asked}");
    assert!(find(&asked, "debian archive")["set_by"].is_null(), "{asked}");
    let table = lab.run(&["config", "show"]).good().stdout;
    assert!(table.contains("server, by BURGEON_LOG") && table.contains("server, by default"), "{table}");
}
