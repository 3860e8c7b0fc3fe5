//! Meta's behaviour.

use burgeon_api::{
    ErrorKind, PipelineId, RequestId, VmId,
    life::Life,
    profile::Profile,
    receipt::{KeptReceipt, Receipt},
    vm::{Intent, Observed},
};
use burgeon_store::{
    meta::{Meta, VmRow},
    rollback::RollBack,
};

use super::{Home, on_both_engines};

pub(crate) fn row(name: &str) -> VmRow {
    VmRow::new(VmId::generate(), name.into(), "tiny".into(), Profile::default(), 5)
}

on_both_engines! {
    a_vm_lives_in_meta,
    a_rollback_is_kept_until_the_next_start,
    a_refusal_does_not_take_its_group_with_it,
    the_vms_of_a_run_are_removed_together,
    what_is_kept_is_there_after_opening_again,
    receipts_are_kept_and_none_comes_twice,
}

async fn a_vm_lives_in_meta(home: Home) {
    let meta = Meta::open(&home.address).unwrap();
    let web = meta.create_vm(row("web")).await.unwrap();
    assert_eq!(meta.create_vm(web.clone()).await.unwrap(), web, "the same id again changes nothing");
    assert_eq!(meta.create_vm(row("web")).await.unwrap_err().kind, ErrorKind::Conflict);
    assert_eq!(meta.vm("web").await.unwrap(), web);
    assert_eq!(meta.vm(&web.id.to_string()).await.unwrap(), web);
    let stale = meta.set_intent(web.id, Intent::Stopped, Some(9)).await.unwrap_err();
    assert_eq!(stale.kind, ErrorKind::Conflict);
    let life = Life { expires_s: Some(9), idle_park_s: None };
    let given = life.clone();
    let set = meta.set_life(web.id, move |_| given.clone()).await.unwrap();
    assert_eq!((set.life.expires_s, set.version), (Some(9), 2));
    assert_eq!(meta.vm("web").await.unwrap(), set);
    assert_eq!(meta.set_intent(web.id, Intent::Removed, Some(2)).await.unwrap().version, 3);
    let kept = meta.set_intent(web.id, Intent::Running, None).await.unwrap();
    assert_eq!(kept.intent, Intent::Removed, "removal is final");
    let late = meta.set_life(web.id, move |_| life.clone()).await.unwrap_err();
    assert_eq!(late.kind, ErrorKind::Conflict, "no time is given to one that goes: {late}");
    meta.forget_vm(web.id).await.unwrap();
    assert_eq!(meta.vm("web").await.unwrap_err().kind, ErrorKind::NotFound);
}

async fn a_rollback_is_kept_until_the_next_start(home: Home) {
    let meta = Meta::open(&home.address).unwrap();
    let web = meta.create_vm(row("web")).await.unwrap();
    let wish = RollBack { request: RequestId::generate(), snapshot: "s1".into() };
    let back = meta.start_again(web.clone(), Some(wish.clone())).await.unwrap();
    assert_eq!((back.rollback.as_ref(), back.starts, back.version), (Some(&wish), 1, 2));
    assert_eq!(meta.vm("web").await.unwrap(), back);
    // One that the host has refused never was; a row that has changed since is left alone.
    meta.take_back_rollback(web).await.unwrap();
    assert_eq!(meta.vm("web").await.unwrap(), back);
    meta.take_back_rollback(back).await.unwrap();
    let row = meta.vm("web").await.unwrap();
    assert_eq!((row.rollback.as_ref(), row.starts, row.version), (None, 0, 3));
    let back = meta.start_again(row, Some(wish)).await.unwrap();
    let again = meta.start_again(back, None).await.unwrap();
    assert_eq!((again.rollback, again.starts), (None, 2));
}

async fn a_refusal_does_not_take_its_group_with_it(home: Home) {
    let meta = Meta::open(&home.address).unwrap();
    let all = (0..64).map(|index| {
        let meta = meta.clone();
        tokio::spawn(async move { meta.create_vm(row(&format!("vm-{}", index / 2))).await })
    });
    let mut refused = 0;
    for task in all.collect::<Vec<_>>() {
        refused += usize::from(task.await.unwrap().is_err());
    }
    assert_eq!(refused, 32);
    assert_eq!(meta.vms().await.unwrap().len(), 32);
}

async fn the_vms_of_a_run_are_removed_together(home: Home) {
    let meta = Meta::open(&home.address).unwrap();
    let run = PipelineId::generate();
    let own = meta.create_vm(VmRow { pipeline: Some(run), ..row("step-1") }).await.unwrap();
    let other = meta.create_vm(row("web")).await.unwrap();
    meta.remove_vms_of(run).await.unwrap();
    let own = meta.vm(&own.name).await.unwrap();
    assert_eq!((own.intent, own.version), (Intent::Removed, 2));
    assert_eq!(meta.vm("web").await.unwrap(), other);
}

async fn receipts_are_kept_and_none_comes_twice(home: Home) {
    let meta = Meta::open(&home.address).unwrap();
    let shown = |vm: VmId, word: &str, given_s: u64| KeptReceipt {
        vm,
        name: "web".into(),
        receipt: Receipt {
            generation: format!("generation {word}"),
            sample: format!("sample {word}"),
            boot_id: format!("boot {word}"),
            ssh_host_key: Some(format!("key {word}")),
            given_s,
            ..Receipt::default()
        },
    };
    let (one, other) = (VmId::generate(), VmId::generate());
    let (first, second) = (shown(one, "a", 1), shown(one, "b", 2));
    assert_eq!(meta.keep_receipts(vec![second.clone(), first.clone()]).await.unwrap(), []);
    assert_eq!(meta.keep_receipts(vec![second.clone()]).await.unwrap(), [], "what is kept is its own");
    drop(meta);
    let meta = Meta::open(&home.address).unwrap();
    let third = shown(other, "c", 3);
    type Repeat = fn(&mut Receipt, &Receipt);
    let repeats: [(&str, Repeat); 4] = [
        ("generation generation a", |own, first| own.generation.clone_from(&first.generation)),
        ("random bytes sample a", |own, first| own.sample.clone_from(&first.sample)),
        ("boot id boot a", |own, first| own.boot_id.clone_from(&first.boot_id)),
        ("SSH host key key a", |own, first| own.ssh_host_key.clone_from(&first.ssh_host_key)),
    ];
    for (named, repeat) in repeats {
        let mut bad = third.clone();
        repeat(&mut bad.receipt, &first.receipt);
        let told = meta.keep_receipts(vec![bad.clone()]).await.unwrap();
        assert_eq!((told.len(), told[0].0), (1, other));
        assert!(told[0].1.message.contains(named) && told[0].1.message.contains("VM web"), "{}", told[0].1);
        assert_eq!(meta.receipts(&other.to_string()).await.unwrap(), []);
        // Also by the same VM: every generation is a machine of its own.
        let told = meta.keep_receipts(vec![KeptReceipt { vm: one, ..bad }]).await.unwrap();
        assert_eq!(told.len(), 1);
    }
    // What a guest has none of is nobody's.
    for word in ["d", "e"] {
        let mut bare = shown(other, word, 4);
        (bare.receipt.boot_id, bare.receipt.ssh_host_key) = (String::new(), None);
        assert_eq!(meta.keep_receipts(vec![bare]).await.unwrap(), []);
    }
    assert_eq!(meta.receipts(&one.to_string()).await.unwrap(), [first, second]);
    assert_eq!(meta.receipts("web").await.unwrap().len(), 4);
    assert_eq!(meta.receipts("nobody").await.unwrap(), []);
}

async fn what_is_kept_is_there_after_opening_again(home: Home) {
    let meta = Meta::open(&home.address).unwrap();
    let web = meta.create_vm(row("wéb")).await.unwrap();
    meta.set_observed(web.id, Observed::Pending, true).await.unwrap();
    drop(meta);
    let meta = Meta::open(&home.address).unwrap();
    assert_eq!(meta.vms().await.unwrap(), [VmRow { launched: true, ..web }]);
}

/// On a server, one process at a time writes meta; the others are told who does.
#[tokio::test]
async fn a_second_writer_of_meta_is_refused_by_name() {
    let mut server = super::server::Server::new();
    let address = server.new_database();
    let meta = Meta::open(&address).unwrap();
    meta.create_vm(row("web")).await.unwrap();
    let open = || Meta::open(&address).err();
    let error = open().unwrap();
    assert_eq!(error.kind, ErrorKind::Conflict);
    assert!(error.message.contains("burgeon meta, process") && error.hint.is_some(), "{error}");
    // The lock is held on the connection that writes, and comes back with it.
    server.stop();
    server.start();
    meta.create_vm(row("second")).await.unwrap();
    assert_eq!(open().unwrap().kind, ErrorKind::Conflict);
    drop(meta);
    assert_eq!(Meta::open(&address).unwrap().vms().await.unwrap().len(), 2);
}
