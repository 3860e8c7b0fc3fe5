use std::{
    io::{Read, Write},
    process::{Command, Stdio},
};

use burgeon_api::pipeline::{ItemHeader, ResultHeader};
use serde_json::{Map, json};

use crate::harness::AGENT;

fn each(script: &str, items: &[(&str, &[u8])]) -> Vec<(ResultHeader, Vec<u8>)> {
    let mut child = Command::new(AGENT)
        .args(["each", "--", "sh", "-c", script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    let (mut expected, mut all) = (Vec::new(), Vec::new());
    for (number, (name, payload)) in (1..).zip(items) {
        let attrs = Map::from_iter([("k".to_string(), json!(1))]);
        let header = ItemHeader { item: number, attempt: 2, name: name.to_string(), attrs, size: payload.len() as u64 };
        expected.push(header.item);
        let line = serde_json::to_string(&header).unwrap();
        all.extend([line.as_bytes(), b"\n", payload].concat());
    }
    let writer = std::thread::spawn(move || input.write_all(&all));
    let mut text = Vec::new();
    child.stdout.take().unwrap().read_to_end(&mut text).unwrap();
    writer.join().unwrap().unwrap();
    assert!(child.wait().unwrap().success());
    let mut rest = &text[..];
    let mut results = Vec::new();
    while !rest.is_empty() {
        let line = rest.iter().position(|byte| *byte == b'\n').unwrap();
        let header: ResultHeader = serde_json::from_slice(&rest[..line]).unwrap();
        let end = line + 1 + usize::try_from(header.size).unwrap();
        results.push((header, rest[line + 1..end].to_vec()));
        rest = &rest[end..];
    }
    assert_eq!(results.iter().map(|(header, _)| header.item).collect::<Vec<_>>(), expected);
    results
}

#[test]
fn payload_attributes_route_and_reason() {
    let script = r#"tr a-z A-Z; echo '{"route":"left","reason":"why","attrs":{"seen":'$BURGEON_ATTRS',"name":"'$BURGEON_NAME'","n":'$BURGEON_ITEM$BURGEON_ATTEMPT'}}' > $BURGEON_RESULT"#;
    let results = each(script, &[("a/b", b"hello"), ("c", b"")]);
    let (header, payload) = &results[0];
    assert_eq!(payload, b"HELLO");
    assert_eq!((header.route.as_deref(), header.reason.as_deref(), &header.error), (Some("left"), Some("why"), &None));
    assert_eq!(json!(header.attrs), json!({"seen": {"k": 1}, "name": "a/b", "n": 12}));
    assert!(header.attempt == 2 && header.work_us > 0 && !header.vm.is_empty());
    assert_eq!((&results[1].0.attrs["n"], results[1].1.len()), (&json!(22), 0));
}

#[test]
fn errors_are_the_items_own() {
    let script = "case $BURGEON_NAME in bad) echo lost; echo first >&2; echo last word >&2; exit 3;; mute) exit 4;; \
                  dead) kill -9 $$;; json) echo nonsense > $BURGEON_RESULT;; *) cat;; esac";
    let results = each(script, &[("bad", b"x"), ("mute", b"x"), ("dead", b"x"), ("json", b"x"), ("good", b"x")]);
    let errors: Vec<_> = results.iter().map(|(header, _)| header.error.clone().unwrap_or_default()).collect();
    assert_eq!(errors[..3], ["last word", "the command ended with code 4", "the command was killed by signal 9"]);
    assert!(errors[3].contains("BURGEON_RESULT"), "{errors:?}");
    assert_eq!((errors[4].as_str(), &results[4].1[..]), ("", &b"x"[..]));
    assert!(results[..4].iter().all(|(_, payload)| payload.is_empty()));
}

#[test]
fn large_payloads_pass_through() {
    let large = vec![b'x'; 3 << 20];
    let results = each("cat", &[("a", &large), ("b", &large)]);
    assert!(results.iter().all(|(_, payload)| *payload == large));
    assert_eq!(each("true", &[("unread", &large)])[0].0.error, None);
}
