//! The step protocol in mode `stream`, as small as it can be: items in, results out.
//!
//! Each item and each result is one line of JSON, then `size` bytes of payload. Results are kept back only while
//! the next item is already here as a whole, so that nobody waits for a result that is done.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::time::Instant;

use serde_json::{Map, Value, json};

/// What a step gets to see of an item.
pub(crate) struct Item<'a> {
    pub(crate) name: &'a str,
    pub(crate) attrs: &'a Map<String, Value>,
    pub(crate) payload: &'a [u8],
}

/// What a step found out.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Outcome {
    pub(crate) attrs: Map<String, Value>,
    pub(crate) route: Option<&'static str>,
    pub(crate) reason: Option<String>,
    /// Fails the item for good.
    pub(crate) error: Option<String>,
    pub(crate) payload: Vec<u8>,
}

impl Outcome {
    pub(crate) fn failed(error: impl Into<String>) -> Self {
        Self { error: Some(error.into()), ..Self::default() }
    }
}

/// The longest header line that is read.
const LONGEST_LINE: u64 = 1 << 20;
/// Payload memory that is kept from one item to the next.
const KEPT_PAYLOAD: usize = 4 << 20;

/// Serves items until standard input ends.
///
/// # Errors
/// Input that breaks the protocol, and input or output that fails.
pub(crate) fn serve(
    input: impl Read,
    output: impl Write,
    vm: &str,
    mut step: impl FnMut(&Item) -> Outcome,
) -> io::Result<()> {
    let mut input = BufReader::with_capacity(64 << 10, input);
    let mut output = io::BufWriter::with_capacity(64 << 10, output);
    let mut line = Vec::new();
    let mut payload = Vec::new();
    loop {
        let header_is_here = input.buffer().contains(&b'\n');
        if !header_is_here {
            output.flush()?;
        }
        line.clear();
        if input.by_ref().take(LONGEST_LINE).read_until(b'\n', &mut line)? == 0 {
            return output.flush();
        }
        let header = Header::parse(&line)?;
        if usize::try_from(header.size).is_ok_and(|size| size > input.buffer().len()) {
            output.flush()?;
        }
        payload.clear();
        payload.shrink_to(KEPT_PAYLOAD);
        if input.by_ref().take(header.size).read_to_end(&mut payload)? as u64 != header.size {
            return Err(broken("input ended in the middle of an item"));
        }

        let start = Instant::now();
        let outcome = step(&Item { name: &header.name, attrs: &header.attrs, payload: &payload });
        let work_us = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);

        let mut result = json!({
            "item": header.item,
            "attempt": header.attempt,
            "vm": vm,
            "attrs": outcome.attrs,
            "work_us": work_us,
            "size": outcome.payload.len(),
        });
        let texts =
            [("route", outcome.route.map(str::to_string)), ("reason", outcome.reason), ("error", outcome.error)];
        for (key, text) in texts {
            if let Some(text) = text {
                result[key] = text.into();
            }
        }
        serde_json::to_writer(&mut output, &result)?;
        output.write_all(b"\n")?;
        output.write_all(&outcome.payload)?;
    }
}

struct Header {
    item: u64,
    attempt: u64,
    name: String,
    attrs: Map<String, Value>,
    size: u64,
}

impl Header {
    fn parse(line: &[u8]) -> io::Result<Self> {
        let mut value: Map<String, Value> =
            serde_json::from_slice(line).map_err(|error| broken(&format!("header is no JSON object: {error}")))?;
        let number = |key: &str| {
            value.get(key).and_then(Value::as_u64).ok_or_else(|| broken(&format!("header has no number `{key}`")))
        };
        let (item, attempt, size) = (number("item")?, number("attempt")?, number("size")?);
        let Some(Value::String(name)) = value.remove("name") else {
            return Err(broken("header has no text `name`"));
        };
        let attrs = match value.remove("attrs") {
            Some(Value::Object(attrs)) => attrs,
            _ => Map::new(),
        };
        Ok(Self { item, attempt, name, attrs, size })
    }
}

fn broken(message: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}

/// The guest's host name: the kernel's, or what the environment says where there is no such file.
pub(crate) fn vm_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .ok()
        .map(|name| name.trim().to_string())
        .filter(|name| !name.is_empty())
        .or_else(|| std::env::var("BURGEON_VM").ok())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;
    use std::rc::Rc;

    fn echo(item: &Item) -> Outcome {
        Outcome { route: Some("next"), payload: item.payload.to_ascii_uppercase(), ..Outcome::default() }
    }

    fn results(output: &[u8]) -> Vec<(Value, Vec<u8>)> {
        let mut rest = output;
        let mut all = Vec::new();
        while !rest.is_empty() {
            let end = rest.iter().position(|byte| *byte == b'\n').unwrap();
            let header: Value = serde_json::from_slice(&rest[..end]).unwrap();
            let size = usize::try_from(header["size"].as_u64().unwrap()).unwrap();
            all.push((header, rest[end + 1..end + 1 + size].to_vec()));
            rest = &rest[end + 1 + size..];
        }
        all
    }

    #[test]
    fn items_become_results() {
        let input = b"{\"item\":7,\"attempt\":2,\"name\":\"a\\nb\",\"attrs\":{},\"size\":5}\nhe\nlo\
                      {\"item\":8,\"attempt\":1,\"name\":\"c\",\"attrs\":{\"k\":1},\"size\":0}\n";
        let mut output = Vec::new();
        let mut names = Vec::new();
        serve(&input[..], &mut output, "extract-1", |item| {
            names.push((item.name.to_string(), item.attrs.len()));
            echo(item)
        })
        .unwrap();
        assert_eq!(names, [("a\nb".to_string(), 0), ("c".to_string(), 1)]);
        let results = results(&output);
        assert_eq!(results[0].1, b"HE\nLO");
        assert_eq!(results[0].0["item"], 7);
        assert_eq!(results[0].0["attempt"], 2);
        assert_eq!(results[0].0["vm"], "extract-1");
        assert_eq!(results[0].0["route"], "next");
        assert_eq!(results[0].0.get("error"), None);
        assert_eq!(results[1].0["item"], 8);
    }

    #[test]
    fn broken_input_is_named() {
        for (input, word) in [
            (&b"nonsense\n"[..], "JSON"),
            (b"{\"attempt\":1,\"name\":\"a\",\"size\":0}\n", "`item`"),
            (b"{\"item\":1,\"attempt\":1,\"size\":0}\n", "`name`"),
            (b"{\"item\":1,\"attempt\":1,\"name\":\"a\",\"size\":9}\nabc", "middle"),
        ] {
            let error = serve(input, Vec::new(), "vm", echo).unwrap_err();
            assert!(error.to_string().contains(word), "{error}");
        }
    }

    /// A reader that gives its input in pieces, and notes at each read what has been written by then.
    struct Pieces {
        pieces: Vec<&'static [u8]>,
        written: Rc<RefCell<Vec<u8>>>,
        seen: Rc<RefCell<Vec<usize>>>,
    }

    impl Read for Pieces {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.seen.borrow_mut().push(results(&self.written.borrow()).len());
            if self.pieces.is_empty() {
                return Ok(0);
            }
            let piece = self.pieces.remove(0);
            buffer[..piece.len()].copy_from_slice(piece);
            Ok(piece.len())
        }
    }

    struct Written(Rc<RefCell<Vec<u8>>>);

    impl Write for Written {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.borrow_mut().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_result_is_never_held_back_while_input_is_awaited() {
        let written = Rc::new(RefCell::new(Vec::new()));
        let seen = Rc::new(RefCell::new(Vec::new()));
        let item = "{\"item\":1,\"attempt\":1,\"name\":\"a\",\"size\":2}\n";
        let pieces: Vec<&'static [u8]> = vec![
            // One item and the start of a header; then its end without the payload; then the payload.
            Box::leak(format!("{item}xx{}", &item[..9]).into_bytes().into_boxed_slice()),
            Box::leak(item.as_bytes()[9..].to_vec().into_boxed_slice()),
            b"yy",
        ];
        let input = Pieces { pieces, written: Rc::clone(&written), seen: Rc::clone(&seen) };
        serve(input, Written(Rc::clone(&written)), "vm", echo).unwrap();
        let seen = seen.borrow();
        assert_eq!(seen[..2], [0, 1], "the first result is out before more input is awaited");
        assert_eq!(seen.last(), Some(&2));
    }
}
