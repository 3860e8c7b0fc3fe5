//! The last steps. `tally` says of which family a file's licences are; `review` says why a file needs a look.

use serde_json::{Map, Value};

use crate::names::{FAMILIES, family};
use crate::step::{Item, Outcome};

fn licences(attrs: &Map<String, Value>) -> impl Iterator<Item = &str> {
    attrs.get("licences").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str)
}

/// Sets `family` to the most demanding family among the licences.
pub(crate) fn tally(item: &Item) -> Outcome {
    let rank = |name: &str| FAMILIES.iter().position(|known| *known == family(name));
    match licences(item.attrs).filter_map(rank).min() {
        Some(rank) => {
            Outcome { attrs: Map::from_iter([("family".to_string(), FAMILIES[rank].into())]), ..Outcome::default() }
        }
        None => Outcome::failed("no licence reached the tally"),
    }
}

/// Gives the reason, in words.
pub(crate) fn review(item: &Item) -> Outcome {
    let text = |key: &str| item.attrs.get(key).and_then(Value::as_str);
    let reason = match text("format") {
        Some("text") => match (text("unknown_licence"), item.payload) {
            (Some(name), _) => format!("names a licence that is not known here: {name}"),
            (None, []) => "no licence named".to_string(),
            (None, words) => format!("speaks of a licence, but names none: {}", String::from_utf8_lossy(words)),
        },
        Some("empty") => "empty file".to_string(),
        Some(format) => format!("not text: {format}"),
        None => "format not known".to_string(),
    };
    Outcome { reason: Some(reason), ..Outcome::default() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn run(step: fn(&Item) -> Outcome, attrs: Value, payload: &str) -> Outcome {
        let Value::Object(attrs) = attrs else { panic!("no object") };
        step(&Item { name: "a", attrs: &attrs, payload: payload.as_bytes() })
    }

    #[test]
    fn the_most_demanding_family_counts() {
        let family = |licences: Value| run(tally, json!({ "licences": licences }), "").attrs["family"].clone();
        assert_eq!(family(json!(["MIT", "GPL-2+"])), "copyleft");
        assert_eq!(family(json!(["LGPL-3+", "MIT"])), "weak copyleft");
        assert_eq!(family(json!(["public-domain", "ISC"])), "permissive");
        assert!(run(tally, json!({}), "").error.is_some());
    }

    #[test]
    fn reasons() {
        let reason = |attrs: Value| run(review, attrs, "").reason.unwrap();
        assert_eq!(reason(json!({"format": "png"})), "not text: png");
        assert_eq!(reason(json!({"format": "empty"})), "empty file");
        assert_eq!(reason(json!({"format": "text"})), "no licence named");
        assert_eq!(
            run(review, json!({"format": "text"}), "its licence").reason.unwrap(),
            "speaks of a licence, but names none: its licence"
        );
        assert_eq!(
            reason(json!({"format": "text", "unknown_licence": "fsf-x"})),
            "names a licence that is not known here: fsf-x"
        );
    }
}
