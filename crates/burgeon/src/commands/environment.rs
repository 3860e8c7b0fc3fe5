//! What the environment says of where things are and how they are reached. A secret is in a variable, or in a file that
//! the variable with `_FILE` behind its name tells, which nobody else may read. None is ever shown.

use std::{fs, io::Read, os::unix::fs::MetadataExt, time::Duration};

use burgeon_api::{Error, Result, http::Setting, remote::S3Access};
use burgeon_store::{objects::S3Settings, places::Elsewhere, sql::Address};

/// Where packs are, instead of the data directory.
const OBJECTS: &str = "BURGEON_OBJECTS";
/// Where the catalog and meta are, instead of the data directory.
const DATABASE: &str = "BURGEON_DATABASE";
/// Where meta is, if it is not beside the catalog. The host process is not told.
const META: &str = "BURGEON_META_DATABASE";
/// How long one request to a bucket may take, with all its retries.
const DEADLINE: Duration = Duration::from_secs(60);
/// The longest secret in a file, in bytes.
const MOST_SECRET: u64 = 64 << 10;

type Variables<'a> = &'a dyn Fn(&str) -> Option<String>;

/// This process's own; what is empty is not set.
pub(super) fn of_process(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// The variables that tell where meta is; for who must not know.
pub(super) fn of_meta() -> [String; 2] {
    [META.into(), file_of(META)]
}

/// What of meta and the store is not in the data directory.
///
/// # Errors
/// `Invalid` for what is no address and without keys; `Refused` for a file of secrets that others may read.
pub(super) fn elsewhere(variable: Variables<'_>) -> Result<Elsewhere> {
    let objects = match variable(OBJECTS) {
        None => None,
        Some(url) => {
            let settings = S3Settings::at(&url, s3_access(variable)?, DEADLINE);
            Some(settings.map_err(|error| error.context(OBJECTS))?)
        }
    };
    let catalog = database(variable, DATABASE)?;
    let meta = database(variable, META)?.or_else(|| catalog.clone());
    Ok(Elsewhere { objects, catalog, meta })
}

/// How that is shown, without secrets.
pub(super) fn shown(variable: Variables<'_>, with_meta: bool) -> Vec<Setting> {
    let here = "in the data directory";
    let all = elsewhere(variable);
    let setting = |name: &str, variables: &[&str], value: Option<String>| {
        let named = |name: &&&str| variable(name).is_some() || variable(&file_of(name)).is_some();
        let set_by = variables
            .iter()
            .find(named)
            .map(|name| if variable(name).is_some() { (*name).to_string() } else { file_of(name) });
        let unread = || if set_by.is_some() { "does not read: see burgeon doctor" } else { here }.to_string();
        Setting { name: name.into(), value: value.unwrap_or_else(unread), set_by }
    };
    let all = all.ok();
    let endpoint = |settings: &S3Settings| match &settings.endpoint {
        Some(endpoint) => format!("{settings} at {endpoint}"),
        None => format!("{settings} at Amazon's, {}", settings.region),
    };
    let objects = all.as_ref().and_then(|all| all.objects.as_ref().map(endpoint));
    let catalog = all.as_ref().and_then(|all| all.catalog.as_ref().map(ToString::to_string));
    let meta = all.as_ref().and_then(|all| all.meta.as_ref().map(ToString::to_string));
    let mut shown = vec![setting("objects", &[OBJECTS], objects), setting("catalog", &[DATABASE], catalog)];
    if with_meta {
        shown.push(setting("meta", &[META, DATABASE], meta));
    }
    shown
}

fn database(variable: Variables<'_>, name: &str) -> Result<Option<Address>> {
    let Some(text) = secret(variable, name)? else { return Ok(None) };
    match text.parse().map_err(|error: Error| error.context(name))? {
        Address::Sqlite(_) => Err(Error::invalid(format!("{name} is no address of a PostgreSQL database")).with_hint(
            "such an address is postgres://USER@HOST/DATABASE, or host=DIRECTORY user=USER dbname=DATABASE",
        )),
        address @ Address::Postgres(_) => Ok(Some(address)),
    }
}

fn file_of(name: &str) -> String {
    format!("{name}_FILE")
}

/// A value that is secret, or holds one.
fn secret(variable: Variables<'_>, name: &str) -> Result<Option<String>> {
    let Some(path) = variable(&file_of(name)) else { return Ok(variable(name)) };
    if variable(name).is_some() {
        return Err(Error::invalid(format!("both {name} and {name}_FILE are set")).with_hint("set one of them"));
    }
    if !path.starts_with('/') {
        // A server that a command starts is in another directory than the command.
        return Err(Error::invalid(format!("{name}_FILE is no whole path")).with_hint("give one that begins with /"));
    }
    let failed = |error: std::io::Error| Error::io(format!("read {path}, which {name}_FILE names"), &error);
    let mut file = fs::File::open(&path).map_err(failed)?;
    let about = file.metadata().map_err(failed)?;
    let mode = about.mode() & 0o7777;
    if !about.is_file() || mode & 0o077 != 0 {
        return Err(Error::refused(format!("{path}, which {name}_FILE names, may be read by others (mode {mode:o})"))
            .with_hint(format!("chmod 600 {path}")));
    }
    let mut text = String::new();
    file.by_ref().take(MOST_SECRET).read_to_string(&mut text).map_err(failed)?;
    Ok(Some(text.trim_end_matches(['\n', '\r']).to_string()).filter(|text| !text.is_empty()))
}

/// What the environment says of how S3 is reached; none without keys.
pub(super) fn s3_access(variable: &dyn Fn(&str) -> Option<String>) -> Result<Option<S3Access>> {
    let (Some(access_key), Some(secret_key)) =
        (variable("AWS_ACCESS_KEY_ID"), secret(variable, "AWS_SECRET_ACCESS_KEY")?)
    else {
        return Ok(None);
    };
    if variable("AWS_SESSION_TOKEN").is_some() {
        return Err(Error::invalid("keys with a session token (AWS_SESSION_TOKEN) are not known here")
            .with_hint("use keys without one"));
    }
    let endpoint = variable("AWS_ENDPOINT_URL_S3").or_else(|| variable("AWS_ENDPOINT_URL"));
    let certificate = variable("AWS_CA_BUNDLE")
        .map(|file| fs::read_to_string(&file).map_err(|error| Error::io(format!("read {file}"), &error)))
        .transpose()?;
    let allowed = variable("AWS_ALLOW_HTTP").is_some_and(|value| value == "true" || value == "1");
    let allow_http = allowed || endpoint.as_deref().is_some_and(is_this_machine);
    let region = variable("AWS_REGION").or_else(|| variable("AWS_DEFAULT_REGION"));
    let region = region.unwrap_or_else(|| "us-east-1".into());
    Ok(Some(S3Access { endpoint, region, access_key, secret_key, allow_http, certificate }))
}

/// Whether an address without TLS never leaves this machine.
fn is_this_machine(endpoint: &str) -> bool {
    let Some(rest) = endpoint.strip_prefix("http://") else { return false };
    let host = rest.split('/').next().unwrap_or_default();
    let host = host.rsplit_once(':').filter(|(_, port)| port.bytes().all(|byte| byte.is_ascii_digit()));
    let host = host.map_or(rest.split('/').next().unwrap_or_default(), |(host, _)| host);
    matches!(host, "127.0.0.1" | "localhost" | "[::1]")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_environment_tells_how_s3_is_reached() {
        let given = |pairs: &'static [(&'static str, &'static str)]| {
            s3_access(&|name| pairs.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_string()))
        };
        assert_eq!(given(&[("AWS_ACCESS_KEY_ID", "a")]).unwrap(), None);
        let keys = given(&[("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b")]).unwrap().unwrap();
        assert_eq!((keys.region.as_str(), keys.endpoint, keys.allow_http), ("us-east-1", None, false));
        let other = given(&[
            ("AWS_ACCESS_KEY_ID", "a"),
            ("AWS_SECRET_ACCESS_KEY", "b"),
            ("AWS_ENDPOINT_URL", "http://localhost:9000/"),
            ("AWS_REGION", "r"),
        ]);
        let other = other.unwrap().unwrap();
        assert!(other.allow_http && other.region == "r");
        let token = given(&[("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b"), ("AWS_SESSION_TOKEN", "t")]);
        assert!(token.unwrap_err().hint.is_some());
        for (endpoint, ours) in [
            ("http://127.0.0.1:1", true),
            ("http://[::1]:1", true),
            ("http://localhost", true),
            ("http://localhost.example.org", false),
            ("http://10.0.0.1:9000", false),
            ("https://localhost", false),
        ] {
            assert_eq!(is_this_machine(endpoint), ours, "{endpoint}");
        }
    }

    #[test]
    fn what_is_elsewhere_is_told_and_its_secrets_are_not() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("secret");
        fs::write(&file, "postgres://ann:hidden@db.lan/burgeon\n").unwrap();
        let path = file.to_str().unwrap();
        let set = |pairs: Vec<(&'static str, String)>| {
            move |name: &str| pairs.iter().find(|(known, _)| *known == name).map(|(_, value)| value.clone())
        };
        assert!(elsewhere(&set(Vec::new())).unwrap().is_nothing());
        assert!(shown(&set(Vec::new()), true).iter().all(|setting| setting.set_by.is_none()));
        let given = set(vec![
            ("BURGEON_OBJECTS", "s3://bucket/a".into()),
            ("BURGEON_DATABASE_FILE", path.into()),
            ("AWS_ACCESS_KEY_ID", "key".into()),
            ("AWS_SECRET_ACCESS_KEY", "hidden".into()),
        ]);
        for (mode, good) in [(0o640, false), (0o604, false), (0o600, true), (0o400, true)] {
            fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
            let read = elsewhere(&given);
            assert_eq!(read.is_ok(), good, "{mode:o}");
            let Err(error) = read else { continue };
            assert!(error.hint.unwrap().starts_with("chmod 600") && !error.message.contains("hidden"));
        }
        let told = shown(&given, true);
        assert_eq!(told[0].value, "s3://bucket/a at Amazon's, us-east-1");
        assert_eq!(told[2].value, "PostgreSQL database burgeon at db.lan, user ann");
        assert_eq!(told[2].set_by.as_deref(), Some("BURGEON_DATABASE_FILE"));
        assert_eq!(shown(&given, false).len(), 2);
        assert!(!format!("{told:?} {:?}", elsewhere(&given).unwrap()).contains("hidden"));
        for (name, wrong) in [
            ("BURGEON_DATABASE", "sqlite:/a"),
            ("BURGEON_DATABASE", "mysql://ann:hidden@db"),
            ("BURGEON_META_DATABASE", "/a/hidden"),
            ("BURGEON_OBJECTS", "s3://ann:hidden@bucket"),
            ("BURGEON_OBJECTS", "/a"),
            ("BURGEON_OBJECTS", "s3://bucket"),
        ] {
            let error = elsewhere(&set(vec![(name, wrong.into())])).unwrap_err();
            assert!(error.hint.is_some() && !error.message.contains("hidden"), "{error}");
        }
    }
}
