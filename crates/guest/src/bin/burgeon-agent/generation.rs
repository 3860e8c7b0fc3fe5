//! Which generation the guest is in, for programs that were captured with state of their own: a page that they may map.

use std::{fs, io, os::unix::fs::FileExt, path::Path};

/// 32 hexadecimal digits and a line's end; zeros in a guest that has not gone on from a captured state.
const PAGE: &str = "/run/burgeon/generation";
const NONE: &str = "00000000000000000000000000000000";
/// For programs in Python, which keep the state of a random generator in memory.
const PYTHON: &str = "/run/burgeon/python/burgeon_random.py";
const PYTHON_TEXT: &str = include_str!("../../../python/burgeon_random.py");

/// Makes both before programs look for them.
pub(crate) fn offer() -> io::Result<()> {
    if let Some(directory) = Path::new(PYTHON).parent() {
        fs::create_dir_all(directory)?;
    }
    fs::write(PYTHON, PYTHON_TEXT)?;
    if Path::new(PAGE).exists() { Ok(()) } else { tell(Path::new(PAGE), NONE) }
}

/// Tells the guest's programs, which stand still meanwhile.
pub(crate) fn renew(generation: &str) -> io::Result<()> {
    tell(Path::new(PAGE), generation)
}

/// In place: whoever has the page mapped sees the same one change.
fn tell(page: &Path, generation: &str) -> io::Result<()> {
    let file = fs::OpenOptions::new().write(true).create(true).truncate(false).open(page)?;
    file.write_all_at(format!("{generation}\n").as_bytes(), 0)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// Takes clones of itself: restores what a capture would hold, and draws.
    const CLONES: &str = r#"
import random
from random import choice, gauss, randint
random.seed(7)
import burgeon_random
random.gauss(0, 1)  # keeps one for later
state, seeded_in = random.getstate(), burgeon_random._seeded_in
seeded = []
burgeon_random.renewed(lambda: seeded.append(1))

def clone(generation):
    random.setstate(state)
    burgeon_random._seeded_in = seeded_in
    with open(PAGE, "r+b") as page:
        page.write(generation)
    return (random.random(), random.getrandbits(64), gauss(0, 1), random.gauss(0, 1), randint(0, 10**9),
            choice(range(10**9)), random.sample(range(10**9), 2), random.randbytes(8), random.uniform(0, 1))

first, again = clone(b"0" * 32), clone(b"0" * 32)
assert first == again and not seeded, "who is no clone draws what it draws"
one, two = clone(b"1" * 32), clone(b"2" * 32)
assert len(seeded) == 2
for a, b, c in zip(first, one, two):
    assert a != b and b != c and a != c, (a, b, c)

# A seed of its own holds until the next clone.
random.seed(7); a = random.random()
random.seed(7); assert a == random.random()

# One that was captured between its draw and its look draws again.
random.setstate(state); old = random.random(); random.setstate(state)
burgeon_random._page = type("Page", (), {"__getitem__": lambda self, part: b"3" * 32})()
assert random.random() != old
"#;

    #[test]
    fn python_draws_other_numbers_in_each_generation() {
        let directory = std::env::temp_dir().join(format!("burgeon-generation-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let page = directory.join("generation");
        tell(&page, NONE).unwrap();
        assert_eq!(fs::read_to_string(&page).unwrap(), format!("{NONE}\n"));
        let path = page.display().to_string();
        fs::write(directory.join("burgeon_random.py"), PYTHON_TEXT.replace(PAGE, &path)).unwrap();
        let script = format!("PAGE = \"{path}\"\n{CLONES}");
        let run = Command::new("python3").args(["-B", "-c", &script]).env("PYTHONPATH", &directory).output();
        // A machine without Python has only the other test.
        if let Ok(run) = run {
            assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
        }
        fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn the_page_stays_the_same_file() {
        use std::os::unix::fs::MetadataExt;
        let page = std::env::temp_dir().join(format!("burgeon-page-{}", std::process::id()));
        tell(&page, NONE).unwrap();
        let open = fs::File::open(&page).unwrap();
        tell(&page, &"a".repeat(32)).unwrap();
        let mut text = [0; 33];
        open.read_exact_at(&mut text, 0).unwrap();
        assert_eq!(text, [&[b'a'; 32][..], b"\n"].concat()[..]);
        assert_eq!(open.metadata().unwrap().ino(), fs::metadata(&page).unwrap().ino());
        fs::remove_file(&page).unwrap();
    }
}
