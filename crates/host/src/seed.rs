//! What cloud-init looks for in an image that is not ours (the NoCloud data source).

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use burgeon_api::{Error, Result, host::Launch, login::Login};
use burgeon_qemu::command::file;
use serde_json::json;

/// Writes the seed into QEMU's directory before that is handed over.
pub(crate) fn write(directory: &Path, launch: &Launch) -> Result<()> {
    if let Some(login) = &launch.profile.login {
        // Checked by the control process; nothing else may get into a file that a guest runs by.
        login.check()?;
    }
    let seed = directory.join(file::SEED);
    let write = || -> std::io::Result<()> {
        fs::create_dir_all(&seed)?;
        fs::set_permissions(&seed, fs::Permissions::from_mode(0o755))?;
        let meta = format!("instance-id: {}\nlocal-hostname: {}\n", launch.id, launch.name);
        for (name, text) in [("meta-data", meta), ("user-data", user_data(launch.profile.login.as_ref()))] {
            fs::write(seed.join(name), text)?;
            fs::set_permissions(seed.join(name), fs::Permissions::from_mode(0o444))?;
        }
        Ok(())
    };
    write().map_err(|error| Error::io("write the NoCloud seed", &error))
}

/// Without a login it names no user. Values are written as JSON, which YAML reads as it stands.
fn user_data(login: Option<&Login>) -> String {
    let mut text = "#cloud-config\ngrowpart: {mode: auto}\nssh_pwauth: false\n".to_string();
    match login {
        None => {}
        Some(Login { user: None, keys }) => text.push_str(&format!("ssh_authorized_keys: {}\n", json!(keys))),
        Some(Login { user: Some(user), keys }) => {
            text.push_str("users:\n  - default\n");
            text.push_str(&format!("  - name: {}\n", json!(user)));
            text.push_str("    lock_passwd: true\n    shell: /bin/sh\n    sudo: \"ALL=(ALL) NOPASSWD:ALL\"\n");
            text.push_str(&format!("    ssh_authorized_keys: {}\n", json!(keys)));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_user_data_is_pinned() {
        let plain = "#cloud-config\ngrowpart: {mode: auto}\nssh_pwauth: false\n";
        assert_eq!(user_data(None), plain);
        let keys = vec!["ssh-ed25519 AAAA me@desk".to_string(), "ssh-rsa AAAB \"quoted\": yes".into()];
        let mut login = Login { user: Some("me".into()), keys };
        assert_eq!(
            user_data(Some(&login)),
            format!(
                r#"{plain}users:
  - default
  - name: "me"
    lock_passwd: true
    shell: /bin/sh
    sudo: "ALL=(ALL) NOPASSWD:ALL"
    ssh_authorized_keys: ["ssh-ed25519 AAAA me@desk","ssh-rsa AAAB \"quoted\": yes"]
"#
            )
        );
        login.user = None;
        login.keys.pop();
        let expected = format!("{plain}ssh_authorized_keys: [\"ssh-ed25519 AAAA me@desk\"]\n");
        assert_eq!(user_data(Some(&login)), expected);
    }
}
