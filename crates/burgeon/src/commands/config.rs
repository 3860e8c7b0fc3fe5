//! Settings: what the processes of a server are given, and `config show`.

use burgeon_api::{
    Result, TimeSpan,
    http::{ServerView, Setting},
};
use serde::Serialize;

use super::{Context, environment};
use crate::{client::Client, output};

/// A setting as it is shown.
#[derive(Debug, Serialize)]
struct Shown {
    name: String,
    value: String,
    from: Source,
    /// The option or the variable; absent for a default.
    #[serde(skip_serializing_if = "Option::is_none")]
    set_by: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Source {
    Default,
    Environment,
    Flag,
    /// The running server says so, whatever this command's own environment says.
    Server,
}

impl Source {
    fn name(self) -> &'static str {
        match self {
            Source::Default => "default",
            Source::Environment => "environment",
            Source::Flag => "flag",
            Source::Server => "server",
        }
    }

    fn of(set_by: Option<&str>) -> Source {
        match set_by {
            None => Source::Default,
            Some(option) if option.starts_with("--") => Source::Flag,
            Some(_) => Source::Environment,
        }
    }
}

fn from_environment(name: &str, variable: &str, default: &str) -> Setting {
    let given = std::env::var(variable).ok().filter(|value| !value.is_empty());
    Setting {
        name: name.into(),
        set_by: given.is_some().then(|| variable.to_string()),
        value: given.unwrap_or_else(|| default.into()),
    }
}

/// What the host process is set by.
pub(super) fn of_host() -> Vec<Setting> {
    let own = [
        from_environment("accelerator", "BURGEON_ACCEL", "auto"),
        from_environment("reserve", "BURGEON_RESERVE", "a twentieth of the memory"),
    ];
    own.into_iter().chain(environment::shown(&environment::of_process, false)).collect()
}

/// What the control process is set by.
pub(super) fn of_control(idle_exit: Option<TimeSpan>) -> Vec<Setting> {
    let own = [
        from_environment("debian archive", "BURGEON_DEBIAN_ARCHIVE", "from this machine's apt"),
        from_environment("log", "BURGEON_LOG", "info"),
        Setting {
            name: "idle exit".into(),
            value: idle_exit.map_or_else(|| "never".into(), |span| span.to_string()),
            set_by: idle_exit.map(|_| "--idle-exit".into()),
        },
    ];
    let meta = environment::shown(&environment::of_process, true).pop();
    own.into_iter().chain(meta).collect()
}

pub(super) async fn show(context: &Context) -> Result<u8> {
    let data = Setting {
        name: "data".into(),
        value: context.data.display().to_string(),
        set_by: context.data_set_by.map(ToString::to_string),
    };
    let server: Option<ServerView> = Client::at(&context.data)?.get_if_served("/v1/server").await?;
    let all = match server {
        Some(server) => of_server(data, server),
        None => {
            output::note(
                "No server runs for this data directory: these are the settings that one started by this command would get.",
            );
            let own = |setting: Setting| shown(Source::of(setting.set_by.as_deref()), setting);
            let idle_exit = crate::client::IDLE_EXIT.parse().ok();
            std::iter::once(data).chain(of_host()).chain(of_control(idle_exit)).map(own).collect()
        }
    };
    if context.json {
        output::json(&all)?;
    } else {
        let rows = all.into_iter().map(|setting| {
            let by = setting.set_by.or_else(|| (setting.from == Source::Server).then(|| "default".into()));
            let by = by.map(|by| format!(", by {by}")).unwrap_or_default();
            vec![setting.name, setting.value, format!("{}{by}", setting.from.name())]
        });
        output::table(&["setting", "value", "from"], rows.collect());
    }
    Ok(0)
}

/// The data directory is this command's: it is what the server was found by.
fn of_server(data: Setting, server: ServerView) -> Vec<Shown> {
    let data = Setting { value: server.data_directory, ..data };
    let mut all = vec![shown(Source::of(data.set_by.as_deref()), data)];
    all.extend(server.settings.into_iter().map(|setting| shown(Source::Server, setting)));
    let name = server.accelerator.map_or("not known", burgeon_api::vm::Accelerator::name);
    for (name, value) in
        [("accelerator in use", format!("{name}: {}", server.accelerator_reason)), ("version", server.version)]
    {
        all.push(Shown { name: name.into(), value, from: Source::Server, set_by: None });
    }
    all
}

fn shown(from: Source, setting: Setting) -> Shown {
    Shown { name: setting.name, value: setting.value, from, set_by: setting.set_by }
}
