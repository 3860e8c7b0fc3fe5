//! A VM's screen by VNC: each client's connection is handed to QEMU, which listens nowhere itself.

use std::os::fd::OwnedFd;

use burgeon_api::{Error, Result};
use burgeon_qemu::qmp::{COMMAND_DEADLINE, Qmp};
use serde_json::json;
use tokio::net::UnixStream;

pub(crate) async fn serve(qmp: Qmp, mut client: UnixStream) {
    match hand_over(&qmp).await {
        Ok(mut screen) => {
            // Either side may leave; that ends the picture and nothing else.
            drop(tokio::io::copy_bidirectional(&mut client, &mut screen).await);
        }
        Err(error) => tracing::warn!(%error, "no display"),
    }
}

async fn hand_over(qmp: &Qmp) -> Result<UnixStream> {
    let (ours, theirs) =
        std::os::unix::net::UnixStream::pair().map_err(|error| Error::io("make a socket pair", &error))?;
    let name = "burgeon-display";
    qmp.execute_with("getfd", json!({"fdname": name}), Some(OwnedFd::from(theirs)), COMMAND_DEADLINE).await?;
    qmp.execute("add_client", json!({"protocol": "vnc", "fdname": name, "skipauth": true})).await?;
    ours.set_nonblocking(true)
        .and_then(|()| UnixStream::from_std(ours))
        .map_err(|error| Error::io("use a socket pair", &error))
}
