//! Objects in a bucket, on a real server.

use std::{
    net::{Ipv4Addr, TcpListener},
    time::{Duration, Instant},
};

use burgeon_api::ErrorKind;
use burgeon_store::objects::{Objects, S3, S3Settings};
use bytes::Bytes;

use crate::{
    contract::{self, Creates},
    s3_server::{BUCKET, Server, free_port},
};

pub(crate) fn settings(server: &Server) -> S3Settings {
    at(format!("http://127.0.0.1:{}", server.port))
}

fn at(endpoint: String) -> S3Settings {
    S3Settings {
        endpoint: Some(endpoint),
        bucket: BUCKET.into(),
        region: "us-east-1".into(),
        access_key: "key".into(),
        secret_key: "secret".into(),
        prefix: "of/this-test".into(),
        allow_http: true,
        certificate: None,
        deadline: Duration::from_secs(30),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bucket_keeps_the_contract() {
    let server = Server::start();
    let s3 = S3::new(settings(&server)).unwrap();
    s3.check().await.unwrap();
    let objects = Objects::from(s3);
    contract::keeps(&objects, Creates::LooksFirst).await;
    assert_eq!(objects.describe("packs/a"), "s3://burgeon/of/this-test/packs/a");
    assert!(server.root.path().join("burgeon/of/this-test/packs/ab/one.pack").is_file());
    let whole = Objects::from(S3::new(S3Settings { prefix: String::new(), ..settings(&server) }).unwrap());
    assert_eq!(whole.length("of/this-test/packs/ab/one.pack").await.unwrap(), 300_000);
    assert!(whole.list("").await.unwrap().iter().all(|object| object.name.starts_with("of/this-test/")));
}

#[tokio::test]
async fn a_pack_of_64_mib_goes_in_one_request() {
    let server = Server::start();
    let objects = Objects::from(S3::new(settings(&server)).unwrap());
    let pack = Bytes::from(vec![0x5a; 64 << 20]);
    objects.put_new("packs/large", pack.clone()).await.unwrap();
    assert_eq!(objects.length("packs/large").await.unwrap(), 64 << 20);
    let end = objects.get_range("packs/large", (64 << 20) - 70_000..64 << 20).await.unwrap();
    assert_eq!(end, pack.slice(..70_000));
}

#[tokio::test]
async fn wrong_settings_are_told_for_what_they_are() {
    let server = Server::start();
    let right = settings(&server);
    for wrong in [
        S3Settings { secret_key: "wrong".into(), ..right.clone() },
        S3Settings { access_key: "nobody".into(), ..right.clone() },
    ] {
        let s3 = S3::new(wrong).unwrap();
        let error = s3.check().await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::Refused, "{error}");
        assert!(error.hint.as_deref().unwrap().contains("secret key"), "{error:?}");
        assert!(!error.message.contains("wrong") && error.message.contains("s3://burgeon/"), "{error}");
        let error = Objects::from(s3).put_new("a", Bytes::from_static(b"a")).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::Refused, "{error}");
    }
    let s3 = S3::new(S3Settings { bucket: "elsewhere".into(), ..right.clone() }).unwrap();
    let error = s3.check().await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::NotFound, "{error}");
    assert!(error.hint.as_deref().unwrap().contains("create the bucket elsewhere"), "{error:?}");
    // This server makes a bucket for whoever puts into it, so only the look is tested.

    for wrong in [
        S3Settings { allow_http: false, ..right.clone() },
        S3Settings { endpoint: Some("localhost:9000".into()), ..right.clone() },
        S3Settings { bucket: String::new(), ..right.clone() },
        S3Settings { prefix: "../elsewhere".into(), ..right.clone() },
        S3Settings { certificate: Some("no certificate".into()), ..right.clone() },
    ] {
        assert_eq!(S3::new(wrong).err().unwrap().kind, ErrorKind::Invalid);
    }
    assert!(!format!("{right:?}").contains("secret\""), "keys are not printed");
}

#[tokio::test]
async fn a_server_that_is_not_there_or_does_not_answer_is_told() {
    let server = Server::start();
    let nobody = Some(format!("http://127.0.0.1:{}", free_port()));
    let objects = Objects::from(S3::new(S3Settings { endpoint: nobody, ..settings(&server) }).unwrap());
    let error = objects.length("a").await.unwrap_err();
    assert_eq!((error.kind, error.hint.is_some()), (ErrorKind::Unavailable, true), "{error}");

    // Takes connections and says nothing.
    let silent = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let endpoint = Some(format!("http://{}", silent.local_addr().unwrap()));
    let settings = S3Settings { endpoint, deadline: Duration::from_millis(600), ..settings(&server) };
    let objects = Objects::from(S3::new(settings).unwrap());
    let begun = Instant::now();
    for error in
        [objects.length("a").await.unwrap_err(), objects.put_new("a", Bytes::from_static(b"a")).await.unwrap_err()]
    {
        assert_eq!(error.kind, ErrorKind::Deadline, "{error}");
    }
    assert!(begun.elapsed() < Duration::from_secs(10));
}

/// No server here has a certificate; that the client gets as far as TLS shows that it has a provider.
#[tokio::test]
async fn tls_is_there() {
    let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let endpoint = format!("https://{}", listener.local_addr().unwrap());
    let hello = async move {
        let (mut connection, _) = listener.accept().await.unwrap();
        let mut first = [0; 3];
        tokio::io::AsyncReadExt::read_exact(&mut connection, &mut first).await.unwrap();
        first
    };
    let hello = tokio::spawn(tokio::time::timeout(Duration::from_secs(20), hello));
    let settings = S3Settings { allow_http: false, deadline: Duration::from_secs(2), ..at(endpoint) };
    assert!(S3::new(settings).unwrap().check().await.is_err());
    assert_eq!(hello.await.unwrap().unwrap()[..2], [0x16, 0x03], "a handshake of TLS");
}
