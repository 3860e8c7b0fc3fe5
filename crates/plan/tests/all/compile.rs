//! Pipeline files: good ones, and what is refused where.

use burgeon_api::{Result, document::Document, pipeline::PipelineSpec};
use burgeon_plan::pipeline::{Graph, Next, read, vm_name};

const GOOD: &str = r#"format = 1
name = "census"
image = "debian"

[[step]]
name = "sort"
command = ["/usr/bin/sort-files", "-v"]
mode = "stream"
vms = 2
[step.env]
LANG = "C"
[[step.file]]
from = "sort-files"
to = "/usr/bin/sort-files"
[step.routes]
text = "read"
other = "skip"

[[step]]
name = "read"
image = "reader"
command = ["read"]
attempts = 5
time_limit = "3s"
to = "skip"

[[step]]
name = "skip"
command = ["true"]
outcome = "done"

[report]
count = ["licence"]
[report.defaults]
licence = "unknown"
"#;

fn try_read(text: &str) -> Result<(PipelineSpec, Graph)> {
    read(&Document::new("p.toml", text))
}

#[test]
fn a_good_file_becomes_a_graph() {
    let (spec, graph) = try_read(GOOD).unwrap();
    assert_eq!(spec.name, graph.name);
    assert_eq!(graph.first, 0);
    assert_eq!(graph.vms(), 4);
    let routes = [("other".to_string(), 2), ("text".to_string(), 1)].into();
    assert_eq!(graph.steps[0].next, Next::Routes(routes));
    assert_eq!(graph.steps[0].files[0].mode, 0o755);
    assert_eq!((graph.steps[0].image.as_str(), graph.steps[1].image.as_str()), ("debian", "reader"));
    assert_eq!(graph.steps[1].next, Next::Step(2));
    assert_eq!(graph.steps[2].next, Next::Outcome("done".to_string()));
}

#[test]
fn the_first_step_may_stand_anywhere() {
    let text = "format = 1\nname = \"p\"\nimage = \"i\"\n\
        [[step]]\nname = \"b\"\ncommand = [\"b\"]\noutcome = \"ok\"\n\
        [[step]]\nname = \"a\"\ncommand = [\"a\"]\nto = \"b\"\n";
    assert_eq!(try_read(text).unwrap().1.first, 1);
}

/// The number of the last line that begins with this.
fn line_of(text: &str, beginning: &str) -> u32 {
    let index = text.lines().collect::<Vec<_>>().iter().rposition(|line| line.starts_with(beginning)).unwrap();
    u32::try_from(index).unwrap() + 1
}

#[test]
fn what_is_wrong_is_refused_with_its_line() {
    // Replace the first text by the second; the error is at the line that begins with the third and holds the fourth.
    for (old, new, line, word) in [
        ("format = 1", "format = 2", "format", "format 2"),
        ("\"census\"", "\"Census\"", "name = \"Census", "'C'"),
        ("name = \"read\"", "name = \"sort\"", "name = \"sort\"", "two steps"),
        ("name = \"read\"", "name = \"Read\"", "name = \"Read\"", "step name"),
        ("name = \"read\"", "name = \"read-each-and-every-one-of-the-files\"", "name = \"read-each", "longer than 32"),
        ("to = \"skip\"", "to = \"skp\"", "to = \"skp\"", "no step \"skp\""),
        ("text = \"read\"", "text = \"raed\"", "text", "no step \"raed\""),
        ("to = \"skip\"", "", "name = \"read\"", "exactly one"),
        ("to = \"skip\"", "to = \"skip\"\noutcome = \"ok\"", "name = \"read\"", "exactly one"),
        ("outcome = \"done\"", "to = \"read\"", "to = \"read\"", "circle: read -> skip -> read"),
        ("outcome = \"done\"", "routes = { again = \"sort\" }", "routes", "circle: sort -> "),
        ("to = \"skip\"", "to = \"read\"", "to = \"read\"", "circle: read -> read"),
        ("text = \"read\"\n", "", "name = \"read\"", "no step leads to \"read\""),
        ("vms = 2", "vms = 0", "vms", "between 1 and 64"),
        ("vms = 2", "vms = 65", "vms", "between 1 and 64"),
        ("vms = 2", "window = 1025", "window", "between 1 and 1024"),
        ("attempts = 5", "attempts = 21", "attempts", "between 1 and 20"),
        ("\"3s\"", "0", "time_limit", "time_limit 0s"),
        ("\"3s\"", "\"31d\"", "time_limit", "not between"),
        ("\"3s\"", "\"3 weeks\"", "time_limit", "no span of time"),
        ("attempts = 5", "payload_limit = 0", "payload_limit", "payload_limit 0"),
        ("attempts = 5", "payload_limit = \"2G\"", "payload_limit", "payload_limit 2G"),
        ("attempts = 5", "profile = \"huge\"", "profile", "no profile"),
        ("image = \"debian\"", "", "name = \"sort\"", "no image"),
        ("image = \"debian\"", "image = \"a/b\"", "image = \"a/b", "'/'"),
        ("image = \"reader\"", "image = \"\"", "image = \"\"", "image name"),
        ("[\"read\"]", "[]", "command = []", "command is empty"),
        ("[\"read\"]", "[\" \"]", "command = [\" \"]", "command is empty"),
        ("[\"read\"]", "[\"a\", \"b\\u0000\"]", "command = [\"a\"", "NUL"),
        ("LANG =", "\"LA NG\" =", "\"LA NG\"", "environment variable"),
        ("LANG =", "1LANG =", "1LANG", "environment variable"),
        ("LANG =", "BURGEON_RESULT =", "BURGEON", "reserved"),
        ("to = \"/usr/bin", "to = \"usr/bin", "to = \"usr", "absolute path"),
        ("to = \"/usr/bin", "to = \"/usr/../bin", "to = \"/usr", ".."),
        ("from = \"sort-files\"", "from = \"\"", "from", "no path"),
        ("from = \"sort-files\"", "from = \"s\"\nmode = \"0789\"", "mode = \"07", "octal"),
        (
            "[[step.file]]",
            "[[step.file]]\nfrom = \"a\"\nto = \"/usr/bin/sort-files\"\n[[step.file]]",
            "to = \"/usr",
            "two files",
        ),
        ("\"done\"", "\"failed\"", "outcome", "reserved"),
        ("\"done\"", "\"Done\"", "outcome", "outcome name"),
        ("[\"licence\"]", "[\"licence\", \"outcome\"]", "count", "of itself"),
        ("[\"licence\"]", "[\"licence\", \"licence\"]", "count", "counted twice"),
        ("[\"licence\"]", "[\"\"]", "count", "no name"),
        ("licence = \"unknown\"", "vms = 3", "vms = 3", "of itself"),
        ("vms = 2", "vmz = 2", "vmz", "did you mean `vms`"),
    ] {
        assert!(GOOD.contains(old), "{old}");
        let text = GOOD.replacen(old, new, 1);
        let error = try_read(&text).unwrap_err();
        let at = error.location.clone().unwrap();
        let expected = line_of(&text, line);
        assert_eq!((at.file.as_str(), at.line), ("p.toml", expected), "{old} -> {new}: {error}");
        assert!(error.message.contains(word), "{old} -> {new}: {error}");
    }
    assert!(try_read("format = 1\nname = \"p\"\nstep = []\n").unwrap_err().message.contains("1 to 64 steps"));
}

#[test]
fn names_of_vms_are_valid_and_distinct() {
    let mut seen = std::collections::BTreeSet::new();
    for step in ["a", "a-1", "a-1-1a2b3c4d", "abcdefghijabcdefghijabcdefghijab"] {
        for ordinal in [1, 2, 64] {
            for life in [1, 2, u16::MAX] {
                for generation in [1, 2, u32::MAX] {
                    let name = vm_name("1a2b3c4d", life, step, ordinal, generation);
                    burgeon_api::name::check("vm", &name).unwrap();
                    assert!(seen.insert(name.clone()), "{name}");
                }
            }
        }
    }
    assert_eq!(vm_name("1a2b3c4d", 1, "extract", 1, 1), "extract-1-1a2b3c4d");
    assert_eq!(vm_name("1a2b3c4d", 1, "extract", 1, 2), "extract-1-1a2b3c4d-g2");
    assert_eq!(vm_name("1a2b3c4d", 2, "extract", 1, 1), "extract-1-1a2b3c4d-l2g1");
}
