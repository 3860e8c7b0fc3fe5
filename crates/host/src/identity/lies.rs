//! Guests that do not tell the truth, over a real channel.

use std::sync::Arc;

use burgeon_api::ErrorKind;
use burgeon_guest::{
    client::Options,
    protocol::{
        About, Answer, Decoder, Frame, GuestMessage, HostMessage, Kind, Received, Request, decode_control,
        encode_control,
    },
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    time::Instant,
};

use super::*;

fn launch() -> Launch {
    serde_json::from_value(serde_json::json!({
        "id": VmId::generate(), "name": "clone", "image_directory": "/nowhere", "profile": {}, "begin": "substrate",
        "image": {
            "format": 3, "name": "tiny", "boot": "agent", "digest": "", "recipe": "", "kernel_release": "", "disk": null,
            "modules": [], "kernel_parameters": [], "init": "", "created_s": 0,
        },
    }))
    .unwrap()
}

/// An honest agent's answer.
fn honest(identity: &protocol::Identity, more: &[Provision]) -> (protocol::Receipt, Vec<Proof>) {
    let receipt = protocol::Receipt {
        generation: identity.generation,
        sample: random().unwrap(),
        time_ns: identity.time_ns,
        host_name: identity.host_name.clone(),
        boot_id: hexadecimal(&random::<16>().unwrap()),
        hardware_addresses: identity.hardware_addresses.clone(),
        ..protocol::Receipt::default()
    };
    let proofs = more.iter().filter_map(|provision| match provision {
        Provision::SshHostKey { public, .. } => Some(Proof::SshHostKey(public.clone())),
        _ => None,
    });
    (receipt, proofs.collect())
}

/// What an agent of this kind is given, and what becomes of it.
async fn given<F>(siblings: &Siblings, version: &str, answer: F) -> Result<Receipt>
where
    F: Fn(&protocol::Identity, &[Provision]) -> Option<(protocol::Receipt, Vec<Proof>)> + Send + 'static,
{
    given_with(siblings, version, &Provisions::default(), answer).await
}

async fn given_with<F>(siblings: &Siblings, version: &str, provisions: &Provisions, answer: F) -> Result<Receipt>
where
    F: Fn(&protocol::Identity, &[Provision]) -> Option<(protocol::Receipt, Vec<Proof>)> + Send + 'static,
{
    let (host, mut guest) = UnixStream::pair().unwrap();
    let about = About { agent_version: version.into(), protocol_version: 1, ..About::default() };
    let agent = tokio::spawn(async move {
        let (mut decoder, mut bytes, mut sequence) = (Decoder::new(), vec![0; 1 << 16], 0);
        while let Ok(count @ 1..) = guest.read(&mut bytes).await {
            let (mut rest, mut said) = (&bytes[..count], Vec::new());
            while !rest.is_empty() {
                rest = &rest[decoder.feed(rest)..];
                while let Some(received) = decoder.next() {
                    let Received::Frame(Frame { kind: Kind::Control, payload, .. }) = received else { continue };
                    let message = match decode_control::<HostMessage>(payload).unwrap() {
                        HostMessage::Hello(hello) => {
                            sequence = 0;
                            GuestMessage::Welcome { session: hello.session, about: about.clone() }
                        }
                        HostMessage::Request { id, request: Request::RenewWith { identity, more } } => {
                            let Some((receipt, more)) = answer(&identity, &more) else { continue };
                            GuestMessage::Reply { id, result: Ok(Answer::Renewed { receipt, more }) }
                        }
                        HostMessage::Request { id, request: Request::Renew(identity) } => {
                            let Some((receipt, _)) = answer(&identity, &[]) else { continue };
                            GuestMessage::Reply { id, result: Ok(Answer::Receipt(receipt)) }
                        }
                        HostMessage::Request { id, request: Request::Provide { .. } } => {
                            GuestMessage::Reply { id, result: Ok(Answer::Done) }
                        }
                        HostMessage::Request { request, .. } => panic!("{request:?}"),
                    };
                    encode_control(&mut said, sequence, &message).unwrap();
                    sequence += 1;
                }
            }
            guest.write_all(&said).await.unwrap();
        }
    });
    let client = AgentClient::connect(host, Options::new([1; 16], "clone", clock_ns));
    client.wait_ready(Instant::now() + IDENTITY_DEADLINE).await.unwrap();
    let own = version.ends_with("parked");
    let giving = Giving { launch: &launch(), own, origin: "substrate base", provisions };
    let outcome = give(&client, giving, siblings).await;
    agent.abort();
    outcome
}

#[tokio::test]
async fn a_guest_that_repeats_another_ones_receipt_is_found_out() {
    let siblings = Siblings::default();
    let first = given(&siblings, "0.1.0+2", |identity, more| Some(honest(identity, more))).await.unwrap();
    assert!(first.ssh_host_key.as_ref().is_some_and(|key| key.starts_with("SHA256:")));
    type Lie = (&'static str, fn(&Receipt, &mut protocol::Receipt));
    let whole: Arc<[Lie]> = Arc::new([
        ("random bytes", |first, receipt| {
            for (at, byte) in receipt.sample.iter_mut().enumerate() {
                *byte = u8::from_str_radix(&first.sample[at * 2..at * 2 + 2], 16).unwrap();
            }
        }),
        ("boot id", |first, receipt| receipt.boot_id.clone_from(&first.boot_id)),
        ("generation is", |first, receipt| {
            for (at, byte) in receipt.generation.iter_mut().enumerate() {
                *byte = u8::from_str_radix(&first.generation[at * 2..at * 2 + 2], 16).unwrap();
            }
        }),
    ]);
    for lie in 0..whole.len() {
        let (lies, first) = (whole.clone(), first.clone());
        let error = given(&siblings, "0.1.0+2", move |identity, more| {
            let (mut receipt, proofs) = honest(identity, more);
            lies[lie].1(&first, &mut receipt);
            Some((receipt, proofs))
        })
        .await
        .unwrap_err();
        assert_eq!(error.kind, ErrorKind::Damaged);
        assert!(error.message.contains(whole[lie].0), "{error}");
    }
}

#[tokio::test]
async fn a_guest_that_is_not_what_it_was_made_is_found_out() {
    let siblings = Siblings::default();
    let error = given(&siblings, "0.1.0+2", |identity, more| {
        let (receipt, proofs) = honest(identity, more);
        Some((protocol::Receipt { generation: [9; 16], ..receipt }, proofs))
    })
    .await
    .unwrap_err();
    assert!(error.message.contains("its generation is 09090909"), "{error}");
    let error = given(&siblings, "0.1.0+2", |identity, more| {
        Some((honest(identity, more).0, vec![Proof::SshHostKey(b"ssh-ed25519 AAAA root@other".to_vec())]))
    })
    .await
    .unwrap_err();
    assert!(error.message.contains("its SSH host key is"), "{error}");
    let error =
        given(&siblings, "0.1.0+2", |identity, more| Some((honest(identity, more).0, vec![Proof::KeptConnections(1)])))
            .await
            .unwrap_err();
    assert!(error.message.contains("1 inherited TCP connections live on"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_shows_nothing_is_given_up() {
    let error = given(&Siblings::default(), "0.1.0+2", |_, _| None).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Deadline);
    assert!(error.message.contains("give the guest its identity"), "{error}");
}

#[tokio::test]
async fn an_agent_of_an_older_state_is_refused_by_name_or_served() {
    let siblings = Siblings::default();
    let error = given(&siblings, "0.1.0", |identity, more| Some(honest(identity, more))).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Refused);
    assert!(error.message.contains("older than this Burgeon"), "{error}");
    // To one that takes no environment none is given; without it, it is nobody's twin all the same.
    let environment = [("A".to_string(), "b".to_string())].into();
    let provisions = Provisions { environment, ..Provisions::default() };
    let error = given_with(&siblings, "0.1.0+2", &provisions, |identity, more| Some(honest(identity, more)));
    let error = error.await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Refused);
    assert!(error.message.contains("takes no environment, files or secrets"), "{error}");
    given_with(&siblings, "0.1.0+3", &provisions, |identity, more| Some(honest(identity, more))).await.unwrap();
    // One that was parked goes on as what it is.
    given(&siblings, "0.1.0 parked", |identity, more| Some(honest(identity, more))).await.unwrap();
}
