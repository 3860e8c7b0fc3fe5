//! What every place for objects keeps to.

use burgeon_api::ErrorKind;
use burgeon_store::objects::Objects;
use bytes::Bytes;

/// What the place under test makes of two writers at the same moment.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Creates {
    /// One of them creates the object.
    Once,
    /// It looks whether there is an object, and then writes: the server of these tests, unlike S3 itself.
    #[cfg_attr(not(feature = "s3"), expect(dead_code, reason = "only the S3 server does so"))]
    LooksFirst,
}

/// Runs the whole contract on a place that holds nothing yet.
pub(crate) async fn keeps(objects: &Objects, creates: Creates) {
    stores_and_reads(objects).await;
    never_overwrites(objects).await;
    replaces_what_was_read(objects).await;
    lists_by_folder(objects).await;
    one_of_many_writers_wins(objects, creates).await;
    refuses_names(objects).await;
}

fn bytes(length: usize, seed: usize) -> Bytes {
    (0..length).map(|at| u8::try_from((at * 7 + at / 256 + seed) % 256).unwrap()).collect()
}

async fn stores_and_reads(objects: &Objects) {
    let pack = bytes(300_000, 1);
    objects.put_new("packs/ab/one.pack", pack.clone()).await.unwrap();
    assert_eq!(objects.length("packs/ab/one.pack").await.unwrap(), 300_000);
    for range in [0..300_000, 0..1, 299_999..300_000, 1000..70_000, 5..5, 0..0, 300_000..300_000] {
        let expected = pack.slice(usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap());
        assert_eq!(objects.get_range("packs/ab/one.pack", range.clone()).await.unwrap(), expected, "{range:?}");
    }
    for range in [0..300_001, 300_000..300_001, 400_000..400_001, 0..u64::MAX] {
        let error = objects.get_range("packs/ab/one.pack", range.clone()).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::Damaged, "{range:?}: {error}");
        assert!(error.message.contains("one.pack"), "{error}");
    }
    #[expect(clippy::reversed_empty_ranges, reason = "that is what is refused")]
    let error = objects.get_range("packs/ab/one.pack", 6..5).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Invalid);

    objects.put_new("empty", Bytes::new()).await.unwrap();
    assert_eq!(objects.length("empty").await.unwrap(), 0);
    assert_eq!(objects.get_range("empty", 0..0).await.unwrap(), Bytes::new());

    assert_eq!(objects.get_range("packs/ab/none", 0..1).await.unwrap_err().kind, ErrorKind::NotFound);
    assert_eq!(objects.length("none/at/all").await.unwrap_err().kind, ErrorKind::NotFound);
}

async fn never_overwrites(objects: &Objects) {
    objects.put_new("once", bytes(1000, 1)).await.unwrap();
    objects.put_new("once", bytes(1000, 2)).await.unwrap();
    assert_eq!(objects.get_range("once", 0..1000).await.unwrap(), bytes(1000, 1), "the first stays");
    for other in [0, 999, 1001] {
        let error = objects.put_new("once", bytes(other, 1)).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::Conflict, "{error}");
        assert!(error.message.contains("1000 bytes"), "{error}");
    }
    objects.delete("once").await.unwrap();
    objects.delete("once").await.unwrap();
    assert_eq!(objects.length("once").await.unwrap_err().kind, ErrorKind::NotFound);
    objects.put_new("once", bytes(7, 1)).await.unwrap();
    assert_eq!(objects.length("once").await.unwrap(), 7);
}

async fn lists_by_folder(objects: &Objects) {
    for name in ["list/b/2", "list/b/1", "list/a", "list/b-2/x", "lists"] {
        objects.put_new(name, bytes(name.len(), 0)).await.unwrap();
    }
    let names = async |folder: &str| {
        let found = objects.list(folder).await.unwrap();
        assert!(found.iter().all(|object| object.modified.elapsed().is_ok_and(|age| age.as_secs() < 3600)));
        found.into_iter().map(|object| (object.name, object.length)).collect::<Vec<_>>()
    };
    let expected = |names: &[&str]| {
        names.iter().map(|name| ((*name).to_owned(), name.len() as u64)).collect::<Vec<(String, u64)>>()
    };
    assert_eq!(names("list").await, expected(&["list/a", "list/b-2/x", "list/b/1", "list/b/2"]));
    assert_eq!(names("list/b").await, expected(&["list/b/1", "list/b/2"]), "a folder, not the beginning of a name");
    assert_eq!(names("list/b/").await, expected(&["list/b/1", "list/b/2"]));
    assert_eq!(names("nothing").await, []);
    let all = objects.list("").await.unwrap();
    assert!(all.len() >= 7 && all.is_sorted_by(|a, b| a.name < b.name));
}

async fn one_of_many_writers_wins(objects: &Objects, creates: Creates) {
    let writers = (0..12_usize).map(|writer| {
        let objects = objects.clone();
        // Of two lengths, each with its own bytes.
        let mine = bytes(100_000 + writer % 2, writer);
        tokio::spawn(async move { objects.put_new("race/one", mine.clone()).await.map(|()| mine) })
    });
    let mut accepted = Vec::new();
    for writer in writers.collect::<Vec<_>>() {
        match writer.await.unwrap() {
            Ok(mine) => accepted.push(mine),
            Err(error) => assert_eq!(error.kind, ErrorKind::Conflict, "{error}"),
        }
    }
    if creates == Creates::Once {
        assert_eq!(accepted.len(), 6, "those of one length");
    }
    let length = objects.length("race/one").await.unwrap();
    let stored = objects.get_range("race/one", 0..length).await.unwrap();
    assert!(accepted.contains(&stored), "the object is one writer's, whole");
}

async fn refuses_names(objects: &Objects) {
    for name in ["", "/a", "a/", "a//b", ".", "..", "a/../b", ".new-1", "a/.b", "a b", "ä", "a\0b", &"a".repeat(201)] {
        assert_eq!(objects.put_new(name, Bytes::new()).await.unwrap_err().kind, ErrorKind::Invalid, "{name:?}");
        assert_eq!(objects.length(name).await.unwrap_err().kind, ErrorKind::Invalid);
        assert_eq!(objects.delete(name).await.unwrap_err().kind, ErrorKind::Invalid);
    }
}

async fn replaces_what_was_read(objects: &Objects) {
    assert!(objects.read("replaced/one", 100).await.unwrap().is_none());
    objects.replace("replaced/one", bytes(10, 1), None).await.unwrap();
    // The answer was lost.
    objects.replace("replaced/one", bytes(10, 1), None).await.unwrap();
    let error = objects.replace("replaced/one", bytes(11, 2), None).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Conflict, "{error}");
    let (first, tag) = objects.read("replaced/one", 100).await.unwrap().unwrap();
    assert_eq!(first, bytes(10, 1));
    objects.replace("replaced/one", bytes(12, 3), Some(tag.clone())).await.unwrap();
    let error = objects.replace("replaced/one", bytes(13, 4), Some(tag)).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Conflict, "{error}");
    assert_eq!(objects.read("replaced/one", 12).await.unwrap().unwrap().0, bytes(12, 3));
    assert_eq!(objects.read("replaced/one", 11).await.unwrap_err().kind, ErrorKind::Damaged);
    let names: Vec<String> = objects.list("replaced").await.unwrap().into_iter().map(|object| object.name).collect();
    assert_eq!(names, ["replaced/one"]);
    objects.delete("replaced/one").await.unwrap();
}
