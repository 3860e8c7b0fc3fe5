//! Builds the guest agent, a small static program that the one binary carries inside.
//!
//! Cargo cannot yet depend on a binary for another target, so cargo is called once more, with a
//! target directory of its own (the outer build holds the lock of the usual one).

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

const TARGET: &str = "x86_64-unknown-linux-musl";

fn main() {
    let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let root = here.ancestors().nth(2).expect("crates/burgeon lies two below the root").to_path_buf();
    // Relative, so that two clones of this project may share a target directory.
    for path in ["../guest/src", "../guest/Cargo.toml", "../api/src", "../../Cargo.lock", "../../Cargo.toml"] {
        println!("cargo::rerun-if-changed={path}");
    }
    println!("cargo::rerun-if-env-changed=BURGEON_AGENT_FILE");
    let agent = match env::var_os("BURGEON_AGENT_FILE") {
        Some(file) => PathBuf::from(file),
        None => build(&root),
    };
    println!("cargo::rustc-env=BURGEON_AGENT_FILE={}", agent.display());
}

fn build(root: &Path) -> PathBuf {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it")).join("agent");
    let cargo = env::var_os("CARGO").expect("cargo sets it");
    let mut command = Command::new(cargo);
    command
        .current_dir(root)
        .args(["build", "--quiet", "--locked", "-p", "burgeon-guest", "--bin", "burgeon-agent"])
        .args(["--no-default-features", "--features", "agent", "--profile", "guest", "--target", TARGET])
        .arg("--target-dir")
        .arg(&out);
    // Settings of the outer build that are not meant for the guest's.
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_ENCODED")
            || text.starts_with("RUSTFLAGS")
            || text == "CARGO_TARGET_DIR"
            || text.starts_with("CARGO_BUILD_")
        {
            command.env_remove(&name);
        }
    }
    let status = command.status().expect("cargo runs");
    assert!(status.success(), "the guest agent does not build; is its target installed? rustup target add {TARGET}");
    out.join(TARGET).join("guest/burgeon-agent")
}
