//! Objects in a bucket of an S3 server: Amazon's, or one that speaks like it and keeps conditional puts
//! (`If-None-Match: *`).
//!
//! TLS is rustls with the provider ring. The HTTP client brings no provider of its own, and rustls takes the one that
//! the process chose; so [`S3::new`] chooses ring, before it makes the first client. Where the process chose another
//! before, that one stays.

use std::{error::Error as StdError, fmt, ops::Range, time::Duration};

use burgeon_api::{Error, ErrorKind, Result, path_text, remote::S3Access};
use bytes::Bytes;
use futures_util::TryStreamExt;
use object_store::{
    BackoffConfig, Certificate, ClientOptions, Error as StoreError, GetOptions, GetRange, ObjectStore, ObjectStoreExt,
    PutMode, PutOptions, PutPayload, RetryConfig,
    aws::{AmazonS3, AmazonS3Builder, S3ConditionalPut},
    client::{HttpError, HttpErrorKind},
    path::Path,
};

use super::{Object, check_name};

/// How often a put is tried whose outcome is not known, or that met another writer.
const PUT_TRIES: u32 = 3;
/// How often the client repeats one request to a server that does not answer or fails.
const RETRIES: usize = 4;
/// Codes of S3 that are about the keys, whichever status they come with.
const REFUSALS: [&str; 6] =
    ["AccessDenied", "ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "NotSignedUp", "SignatureDoesNotMatch"];
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Which bucket, and how to reach it.
#[derive(Clone, PartialEq, Eq)]
pub struct S3Settings {
    /// Such as `https://s3.example.org:9000`; none means Amazon's, by region.
    pub endpoint: Option<String>,
    pub bucket: String,
    pub region: String,
    pub access_key: String,
    pub secret_key: String,
    /// A folder in the bucket that all names begin with; empty for the whole bucket.
    pub prefix: String,
    /// Allows an endpoint without TLS.
    pub allow_http: bool,
    /// Certificates in PEM that are trusted beside the system's.
    pub certificate: Option<String>,
    /// How long one operation may take, with all its retries.
    pub deadline: Duration,
}

impl fmt::Debug for S3Settings {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let S3Settings { endpoint, bucket, region, access_key, prefix, allow_http, deadline, .. } = self;
        formatter
            .debug_struct("S3Settings")
            .field("endpoint", endpoint)
            .field("bucket", bucket)
            .field("region", region)
            .field("access_key", access_key)
            .field("prefix", prefix)
            .field("allow_http", allow_http)
            .field("deadline", deadline)
            .finish_non_exhaustive()
    }
}

impl S3Settings {
    /// What `s3://BUCKET/PREFIX` means, with how its server is reached.
    ///
    /// # Errors
    /// `Invalid` without keys, and for what is no such address.
    pub fn at(url: &str, access: Option<S3Access>, deadline: Duration) -> Result<S3Settings> {
        let wrong = |why: &str| {
            Error::invalid(format!("{why} is no address of a bucket"))
                .with_hint("such an address is s3://BUCKET/PREFIX")
        };
        // Somebody may have written keys into it, so that it is not repeated then.
        let rest = url.strip_prefix("s3://").ok_or_else(|| wrong("what does not begin with s3://"))?;
        if rest.contains(['@', '?']) {
            return Err(wrong("what holds '@' or '?'"));
        }
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let access = access.ok_or_else(|| {
            Error::invalid(format!("{} needs keys", path_text::printable(url))).with_hint(
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and AWS_ENDPOINT_URL for a server of your own",
            )
        })?;
        Ok(S3Settings {
            endpoint: access.endpoint,
            bucket: bucket.into(),
            region: access.region,
            access_key: access.access_key,
            secret_key: access.secret_key,
            prefix: prefix.trim_end_matches('/').into(),
            allow_http: access.allow_http,
            certificate: access.certificate,
            deadline,
        })
    }
}

/// `s3://BUCKET/PREFIX`.
impl fmt::Display for S3Settings {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "s3://{}", self.bucket)?;
        if self.prefix.is_empty() { Ok(()) } else { write!(formatter, "/{}", self.prefix) }
    }
}

/// A bucket, or a folder of it.
#[derive(Debug)]
pub struct S3 {
    pub(super) client: AmazonS3,
    settings: S3Settings,
}

impl S3 {
    /// Prepares a client; nothing is asked of the server yet. [`S3::check`] does.
    ///
    /// # Errors
    /// `Invalid` for settings that cannot be right.
    pub fn new(settings: S3Settings) -> Result<S3> {
        // It fails where a provider is chosen already, which is as good.
        drop(rustls::crypto::ring::default_provider().install_default());

        let wrong = |why: String| Error::invalid(format!("settings of the S3 bucket \"{}\": {why}", settings.bucket));
        if !settings.prefix.is_empty() {
            check_name(&settings.prefix).map_err(|error| wrong(format!("prefix: {error}")))?;
        }
        if settings.bucket.is_empty() {
            return Err(wrong("it has no name".into()));
        }
        // Somebody may have written keys into it, so that it is not repeated then.
        if settings.endpoint.as_ref().is_some_and(|endpoint| endpoint.contains('@')) {
            return Err(wrong("the endpoint holds '@'".into()).with_hint("keys have variables of their own"));
        }
        if let Some(endpoint) = &settings.endpoint
            && !endpoint.starts_with("https://")
            && !(settings.allow_http && endpoint.starts_with("http://"))
        {
            let error = wrong(format!("the endpoint {endpoint} does not begin with https://"));
            return Err(error.with_hint("use TLS, or allow HTTP where the network is trusted"));
        }
        let mut options = ClientOptions::new()
            .with_allow_http(settings.allow_http)
            .with_connect_timeout(CONNECT_TIMEOUT)
            // Half, so that one answer that never comes leaves time for another try.
            .with_timeout(settings.deadline / 2);
        if let Some(pem) = &settings.certificate {
            let certificates =
                Certificate::from_pem_bundle(pem.as_bytes()).map_err(|error| wrong(format!("certificate: {error}")))?;
            if certificates.is_empty() {
                return Err(wrong("certificate: it holds none in PEM".into()));
            }
            options = certificates.into_iter().fold(options, ClientOptions::with_root_certificate);
        }
        let backoff = BackoffConfig {
            init_backoff: Duration::from_millis(100),
            max_backoff: Duration::from_secs(3),
            ..BackoffConfig::default()
        };
        let mut builder = AmazonS3Builder::new()
            .with_bucket_name(&settings.bucket)
            .with_region(&settings.region)
            .with_access_key_id(&settings.access_key)
            .with_secret_access_key(&settings.secret_key)
            .with_allow_http(settings.allow_http)
            .with_conditional_put(S3ConditionalPut::ETagMatch)
            .with_retry(RetryConfig { backoff, max_retries: RETRIES, retry_timeout: settings.deadline })
            .with_client_options(options);
        if let Some(endpoint) = &settings.endpoint {
            builder = builder.with_endpoint(endpoint);
        }
        let client = builder.build().map_err(|error| wrong(reason(&error)))?;
        Ok(S3 { client, settings })
    }

    /// Asks the server for the bucket, so that wrong settings are told at once.
    ///
    /// # Errors
    /// `Refused` for wrong keys, `NotFound` without the bucket, `Unavailable` without the server.
    pub async fn check(&self) -> Result<()> {
        let folder = Path::from("burgeon-check");
        self.within("look into", "", self.client.list_with_delimiter(Some(&folder))).await?;
        Ok(())
    }

    pub(super) async fn put_new(&self, name: &str, bytes: Bytes) -> Result<()> {
        let path = self.path(name);
        let mut tries = 0;
        loop {
            tries += 1;
            let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
            let put = self.client.put_opts(&path, PutPayload::from(bytes.clone()), options);
            let Err(error) = self.deadline("write", name, put).await? else { return Ok(()) };
            if let StoreError::AlreadyExists { .. } = error {
                match self.length(name).await {
                    Ok(length) if length == bytes.len() as u64 => return Ok(()),
                    Ok(length) => {
                        let place = self.describe(name);
                        let ours = bytes.len();
                        return Err(Error::conflict(format!(
                            "write {place}: the name is taken, by {length} bytes; these are {ours}"
                        )));
                    }
                    // The other writer has not finished, or was taken back.
                    Err(gone) if gone.kind == ErrorKind::NotFound && tries < PUT_TRIES => continue,
                    Err(gone) => return Err(gone),
                }
            }
            // The answer was lost; if the put was done, the next one finds it.
            let lost = matches!(http_kind(&error), Some(HttpErrorKind::Timeout | HttpErrorKind::Interrupted));
            if !lost || tries >= PUT_TRIES {
                return Err(self.told("write", name, &error));
            }
        }
    }

    pub(super) async fn get_range(&self, name: &str, range: Range<u64>) -> Result<Bytes> {
        let wanted = range.end - range.start;
        if wanted > 0 {
            let path = self.path(name);
            match self.deadline("read", name, self.client.get_range(&path, range.clone())).await? {
                Ok(bytes) if bytes.len() as u64 == wanted => return Ok(bytes),
                Err(error) if !matches!(error, StoreError::Generic { .. }) || http_kind(&error).is_some() => {
                    return Err(self.told("read", name, &error));
                }
                // Too few bytes, or an answer of which the client makes nothing: perhaps the object ends before the
                // range.
                Ok(_) => {}
                Err(error) => {
                    if self.length(name).await? >= range.end {
                        return Err(self.told("read", name, &error));
                    }
                }
            }
        }
        let length = self.length(name).await?;
        if wanted == 0 && range.end <= length {
            return Ok(Bytes::new());
        }
        let Range { start, end } = range;
        Err(Error::damaged(format!("{} has {length} bytes, not those from {start} to {end}", self.describe(name))))
    }

    /// What of the range the object has, which begins within it.
    pub(super) async fn get_up_to(&self, name: &str, range: Range<u64>) -> Result<Bytes> {
        let path = self.path(name);
        let options = GetOptions { range: Some(GetRange::Bounded(range)), ..GetOptions::default() };
        let read = async { self.client.get_opts(&path, options).await?.bytes().await };
        self.within("read", name, read).await
    }

    pub(super) async fn length(&self, name: &str) -> Result<u64> {
        let path = self.path(name);
        Ok(self.within("look at", name, self.client.head(&path)).await?.size)
    }

    pub(super) async fn list(&self, folder: &str) -> Result<Vec<Object>> {
        let place = self.path(folder);
        let listing = self.client.list(Some(&place)).try_collect::<Vec<_>>();
        let skipped = if self.settings.prefix.is_empty() { 0 } else { self.settings.prefix.len() + 1 };
        let mut found = Vec::new();
        for object in self.within("list", folder, listing).await? {
            let Some(name) = object.location.as_ref().get(skipped..) else { continue };
            if check_name(name).is_ok() {
                found.push(Object {
                    name: name.to_owned(),
                    length: object.size,
                    modified: object.last_modified.into(),
                });
            }
        }
        found.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }

    pub(super) async fn delete(&self, name: &str) -> Result<()> {
        let path = self.path(name);
        match self.deadline("remove", name, self.client.delete(&path)).await? {
            Err(error) if !matches!(error, StoreError::NotFound { .. }) || names_bucket(&error) => {
                Err(self.told("remove", name, &error))
            }
            _ => Ok(()),
        }
    }

    /// `s3://BUCKET/PREFIX/NAME`.
    #[must_use]
    pub fn describe(&self, name: &str) -> String {
        format!("s3://{}/{}", self.settings.bucket, self.path(name))
    }

    pub(super) fn path(&self, name: &str) -> Path {
        let prefix = self.settings.prefix.split('/').filter(|part| !part.is_empty());
        prefix.chain(name.split('/').filter(|part| !part.is_empty())).collect()
    }

    pub(super) async fn within<T>(
        &self,
        action: &str,
        name: &str,
        request: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T> {
        self.deadline(action, name, request).await?.map_err(|error| self.told(action, name, &error))
    }

    /// No request goes on for longer than the settings allow, whatever the client below does.
    pub(super) async fn deadline<T>(&self, action: &str, name: &str, request: impl Future<Output = T>) -> Result<T> {
        tokio::time::timeout(self.settings.deadline, request).await.map_err(|_| {
            let seconds = self.settings.deadline.as_secs_f32();
            Error::deadline(format!("{action} {}: no answer within {seconds} s", self.describe(name)))
        })
    }

    pub(super) fn told(&self, action: &str, name: &str, error: &StoreError) -> Error {
        let text = format!("{action} {}: {}", self.describe(name), reason(error));
        let bucket = &self.settings.bucket;
        let refused = |text: String| {
            Error::refused(text).with_hint(format!(
                "check access key and secret key, and that they may list, read and write the bucket {bucket}"
            ))
        };
        match error {
            _ if names_bucket(error) => Error::not_found(text)
                .with_hint(format!("create the bucket {bucket}, or correct its name in the settings")),
            StoreError::NotFound { .. } => Error::not_found(text),
            StoreError::PermissionDenied { .. } | StoreError::Unauthenticated { .. } => refused(text),
            _ if names(error, &REFUSALS) => refused(text),
            StoreError::AlreadyExists { .. } => Error::conflict(text),
            _ => match http_kind(error) {
                Some(HttpErrorKind::Timeout) => Error::deadline(text),
                Some(HttpErrorKind::Connect | HttpErrorKind::Request | HttpErrorKind::Interrupted) => {
                    let endpoint = self.settings.endpoint.as_deref().unwrap_or("Amazon's S3");
                    Error::unavailable(text).with_hint(format!("check that {endpoint} can be reached from here"))
                }
                _ if server_failed(error) => Error::unavailable(text),
                _ => Error::internal(text),
            },
        }
    }
}

fn sources(error: &StoreError) -> impl Iterator<Item = &(dyn StdError + 'static)> {
    let outermost: &(dyn StdError + 'static) = error;
    std::iter::successors(Some(outermost), |&error| error.source())
}

fn http_kind(error: &StoreError) -> Option<HttpErrorKind> {
    sources(error).find_map(|source| source.downcast_ref::<HttpError>()).map(HttpError::kind)
}

/// Whether a server answered that it has no such bucket, rather than no such object.
pub(super) fn names_bucket(error: &StoreError) -> bool {
    names(error, &["NoSuchBucket"])
}

/// Whether the server's answer has one of these codes.
fn names(error: &StoreError, codes: &[&str]) -> bool {
    sources(error).any(|source| {
        let text = source.to_string();
        codes.iter().any(|code| text.contains(&format!("<Code>{code}</Code>")))
    })
}

/// The client keeps the type of this error to itself, and gives its text.
fn server_failed(error: &StoreError) -> bool {
    sources(error).any(|source| source.to_string().contains("status code: 5"))
}

/// The innermost cause; of an answer in S3's XML, its code and message.
fn reason(error: &StoreError) -> String {
    let text = sources(error).last().map(ToString::to_string).unwrap_or_default();
    let field = |name: &str| {
        let (_, rest) = text.split_once(&format!("<{name}>"))?;
        rest.split_once(&format!("</{name}>")).map(|(value, _)| value)
    };
    match (field("Code"), field("Message")) {
        (Some(code), Some(message)) => format!("{code}: {message}"),
        (Some(code), None) => code.to_owned(),
        _ => text.trim().trim_end_matches(':').to_owned(),
    }
}
