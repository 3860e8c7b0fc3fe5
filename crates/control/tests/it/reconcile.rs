//! One action for a VM at a time, and no VM waits for another's.

use burgeon_api::{
    ErrorKind, VmId,
    substrate::Forked,
    vm::{Intent, Observed, VmView},
};

use crate::desk::Desk;

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_removal_holds_up_no_other_vm() {
    let desk = Desk::open().await;
    desk.running("slow").await;
    desk.host.hold("remove slow");
    let removal = tokio::spawn(desk.ask::<()>("DELETE", "/v1/vms/slow", &serde_json::json!(null)));
    desk.host.was_asked("remove slow").await;
    let quick = desk.running("quick").await;
    assert_eq!(quick.observed, Observed::Running);
    desk.delete("/v1/vms/quick").await.unwrap();
    assert!(!desk.host.has("quick") && desk.host.has("slow"));
    assert!(!removal.is_finished());
    desk.host.release("remove slow");
    removal.await.unwrap().unwrap();
    assert_eq!(desk.get::<VmView>("/v1/vms/slow").await.unwrap_err().kind, ErrorKind::NotFound);
    let asked = desk.host.asked.borrow().iter().filter(|request| *request == "remove slow").count();
    assert_eq!(asked, 1, "looks at the host go on meanwhile and ask for nothing twice");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removal_does_not_wait_for_a_guest_that_stops() {
    let desk = Desk::open().await;
    desk.running("stubborn").await;
    desk.host.hold("stop stubborn");
    let stop = tokio::spawn(desk.ask::<VmView>("POST", "/v1/vms/stubborn/stop", &serde_json::json!({})));
    desk.host.was_asked("stop stubborn").await;
    desk.delete("/v1/vms/stubborn").await.unwrap();
    desk.host.release("stop stubborn");
    // Its answer does not matter: the VM is gone.
    drop(stop.await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn leaving_waits_for_what_the_host_was_asked() {
    let mut desk = Desk::open().await;
    desk.running("last").await;
    desk.host.hold("remove last");
    let removal = tokio::spawn(desk.ask::<()>("DELETE", "/v1/vms/last", &serde_json::json!(null)));
    desk.host.was_asked("remove last").await;
    let left = tokio::spawn(desk.leave());
    desk.host.release("remove last");
    left.await.unwrap();
    let rows: u32 = desk.meta().query_row("SELECT count(*) FROM vm", [], |row| row.get(0)).unwrap();
    assert_eq!(rows, 0, "the removal was carried to its end");
    // Cut off with the process, or answered: either will do.
    drop(removal.await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_vm_starts_when_asked_and_by_nothing_else() {
    let mut desk = Desk::open().await;
    let first = desk.running("web").await;
    assert_eq!(desk.post("/v1/vms/web/start").await.unwrap().version, first.version, "it runs already");
    desk.post("/v1/vms/web/stop").await.unwrap();
    let stopped = desk.until("web", |vm| matches!(vm.observed, Observed::Stopped { .. })).await;
    assert_eq!(stopped.intent, Intent::Stopped);
    desk.host.hold("start web");
    let awaited = desk.post("/v1/vms/web/start").await.unwrap();
    assert_eq!((awaited.observed, awaited.intent, awaited.starts), (Observed::Pending, Intent::Running, 1));
    desk.host.was_asked("start web").await;
    assert_eq!(desk.post("/v1/vms/web/start").await.unwrap().starts, 1, "it is on its way");
    desk.host.release("start web");
    let again: VmView = desk.get("/v1/vms/web/wait").await.unwrap();
    assert_eq!((again.id, again.observed), (first.id, Observed::Running));
    // It ends by itself, and stays so, also for the next control process.
    desk.host.set("web", &Observed::Stopped { reason: "the guest powered off".into() });
    desk.until("web", |vm| matches!(vm.observed, Observed::Stopped { .. })).await;
    desk.restart().await;
    desk.running("other").await;
    let view = desk.until("web", |vm| vm.on_host.is_some()).await;
    assert!(matches!(view.observed, Observed::Stopped { .. }), "{view:?}");
    assert_eq!(desk.host.asked.borrow().iter().filter(|request| *request == "start web").count(), 1);
    desk.host.set("web", &Observed::Failed { reason: "signal 9".into() });
    desk.until("web", |vm| matches!(vm.observed, Observed::Failed { .. })).await;
    let refused = desk.post("/v1/vms/web/start").await.unwrap_err();
    assert!(refused.kind == ErrorKind::Conflict && refused.message.contains("VM web has failed"), "{refused}");
    assert!(refused.hint.is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fork_that_is_asked_for_again_makes_no_others_and_removes_none() {
    let desk = Desk::open().await;
    let source = desk.running("web").await;
    let fork = |ids: &[VmId], names: &[&str], all_or_nothing: bool| {
        let request = serde_json::json!({"ids": ids, "names": names, "all_or_nothing": all_or_nothing});
        desk.ask::<Forked>("POST", "/v1/vms/web/fork", &request)
    };
    let ids = [VmId::generate(), VmId::generate()];
    let first = fork(&ids, &["a", "b"], false).await.unwrap();
    assert!(first.children.iter().all(|child| child.error.is_none()));
    let again = fork(&ids, &["a", "b"], false).await.unwrap();
    assert_eq!(again.children, first.children);
    assert_eq!(desk.host.asked.borrow().iter().filter(|request| *request == "fork web").count(), 1);
    // Ids of others, of some others, and twice the same.
    for wrong in [vec![source.id], vec![ids[0], VmId::generate()]] {
        let names: Vec<String> = wrong.iter().map(|id| format!("x-{}", id.short())).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        assert_eq!(fork(&wrong, &names, false).await.unwrap_err().kind, ErrorKind::Conflict);
    }
    let one = VmId::generate();
    assert_eq!(fork(&[one, one], &["c", "d"], false).await.unwrap_err().kind, ErrorKind::Invalid);
    // One result for each, or none at all.
    let new = || [VmId::generate(), VmId::generate()];
    let partial = fork(&new(), &["e", "e-bad"], false).await.unwrap();
    assert_eq!(partial.children.iter().map(|child| child.error.is_some()).collect::<Vec<_>>(), [false, true]);
    let nothing = fork(&new(), &["f", "f-bad"], true).await.unwrap_err();
    assert!(nothing.message.contains("f-bad"), "{nothing}");
    desk.host.was_asked("remove f").await;
    for name in ["web", "a", "b", "e"] {
        assert_eq!(desk.get::<VmView>(&format!("/v1/vms/{name}/wait")).await.unwrap().observed, Observed::Running);
    }
}
