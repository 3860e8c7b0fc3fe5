//! Rows of meta that do not read are told, and hold up nothing.

use burgeon_api::{
    ErrorKind,
    pipeline::{PipelineView, RunState},
    vm::{Observed, VmView},
};

use crate::desk::Desk;

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_row_is_told_spared_and_removed_on_request() {
    let mut desk = Desk::open().await;
    let bad = desk.running("bad").await;
    desk.running("good").await;
    let id = bad.id.to_string();
    let meta = desk.meta();
    meta.execute("UPDATE vm SET profile = '{' WHERE id = ?1", [&id]).unwrap();
    meta.execute("INSERT INTO pipeline VALUES ('p', 'broken-run', '{}', '\"running\"', '}', 7)", []).unwrap();
    // A control process that begins with such rows serves all the same, and so does one that meets them.
    for round in 0..2 {
        let vms: Vec<VmView> = desk.get("/v1/vms").await.unwrap();
        let told = vms.iter().find(|vm| vm.id == bad.id).unwrap();
        let Observed::Damaged { reason } = &told.observed else { panic!("{told:?}") };
        assert!(reason.contains(&id) && reason.contains("EOF"), "{reason}");
        assert_eq!(told.name, "bad");
        assert_eq!(vms.len(), 2);
        let other = format!("other-{round}");
        desk.running(&other).await;
        desk.delete(&format!("/v1/vms/{other}")).await.unwrap();
        assert!(desk.host.has("bad"), "a VM whose row does not read is nobody's orphan");
        let runs: Vec<PipelineView> = desk.get("/v1/pipelines").await.unwrap();
        let error = runs[0].error.as_ref().unwrap();
        assert_eq!(
            (runs[0].name.as_str(), runs[0].state, error.kind),
            ("broken-run", RunState::Failed, ErrorKind::Damaged)
        );
        desk.restart().await;
    }
    let refused = desk.get::<VmView>("/v1/vms/bad").await.unwrap_err();
    assert!(refused.message.contains("VM bad") && refused.hint.unwrap().contains(&id));
    desk.delete(&format!("/v1/vms/{id}")).await.unwrap();
    assert!(!desk.host.has("bad") && desk.host.has("good"));
    let vms: Vec<VmView> = desk.get("/v1/vms").await.unwrap();
    assert_eq!(vms.iter().map(|vm| vm.name.as_str()).collect::<Vec<_>>(), ["good"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn where_an_id_does_not_read_no_orphan_is_removed() {
    let desk = Desk::open().await;
    desk.running("bad").await;
    desk.meta().execute("UPDATE vm SET id = 'scribble'", []).unwrap();
    desk.running("good").await;
    assert!(desk.host.has("bad"));
    let vms: Vec<VmView> = desk.get("/v1/vms").await.unwrap();
    assert!(matches!(&vms[1].observed, Observed::Damaged { reason } if reason.contains("scribble")), "{vms:?}");
    desk.delete("/v1/vms/bad").await.unwrap();
    // With the row gone its VM is an orphan like any other.
    desk.host.was_asked("remove bad").await;
}
