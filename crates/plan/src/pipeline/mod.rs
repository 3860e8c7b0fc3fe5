//! Pipelines: whether a file is sound ([`compile`], [`read`]), and how its run goes ([`Run`]).
//!
//! `Run` owns the whole state of one run: its items, the VMs of its steps, its counts. The control
//! process owns the `Run`, tells it what happened ([`Event`]) and does what it answers ([`Action`]).
//!
//! ```text
//! item:  (found) -> waiting --Dispatch--> in a VM --result--> waiting at the next step, or finished
//!                      ^                     |
//!                      +---- Retry ----------+-- tries used up, error, bad route, too large --> finished: failed
//!
//! VM:    (none) --StartVm--> starting --ready--> ready --no item can come any more--> StopVm
//!           ^                   | failed           | lost, or over the time limit
//!           +---- (rest) -------+------------------+   (StopVm; the next one has a new generation)
//!
//! run:   preparing --first VM ready--> running --listed, no item left--> done
//!            +------------------------------+----> failed, cancelled
//! ```
//!
//! # Rules
//! - **Exactly once.** An item belongs to one VM at a time, under an attempt number that rises with
//!   each dispatch at a step. A result counts only if VM, generation and attempt are the current ones
//!   and the VM told its own name. All else is answered with [`Action::Refuse`].
//! - **Every `StartVm` has one `StopVm`**, also after the VM was lost or failed to start: what is
//!   left of it is removed in one place. Nothing is dispatched to a VM after its `StopVm`.
//! - **Tries are not attempts.** The attempt number is a fence; what `attempts` in the file limits is the
//!   tries charged to an item. When a VM is lost, only the item that it held longest is charged;
//!   its neighbours in the window are not. All of them become suspects: a suspect is given to an
//!   empty VM and nothing goes beside it, so that a second loss convicts the right one. Where no VM is
//!   empty or starting, one is emptied for the suspects; the others go on.
//! - **The time limit** runs from when an item became the oldest in its VM: with programs that work in
//!   order of arrival, it has then begun. Past it the VM is replaced, that item is charged and
//!   becomes a suspect; its neighbours go back without charge or suspicion.
//! - **Back-pressure.** A step whose queue holds four times what its VMs take at once stops dispatch
//!   at the steps before it. Nothing that a step waits for lies behind it, so this cannot lock up.
//! - **Budget of bytes.** An item weighs its file's size while a VM of the first step has it, and its payload's between
//!   and in the steps behind. While all weigh more than the pipeline's budget, the first step gets no item: its file
//!   is not read. Steps behind go on, so the weight falls. What is larger than the budget goes when nothing else weighs.
//! - **Broken steps.** VMs that fail to start, or are lost idle, 3 times the step's VMs + 3 times without
//!   a result between them, fail the run. So do VMs lost with items, 4 times `attempts` more than
//!   that, before a step gave its first result: its command is broken, not its files. From the second
//!   misfortune on, a replacement rests (0.2 s, doubling, up to 5 s); the first event after that starts it.
//! - **No idle VMs.** A step has no more VMs than items that can still reach it, and loses its VMs as
//!   soon as none can. A run without files starts none.
//! - **A new life.** When the control process starts again it builds a new `Run` with the next `life`
//!   number, tells it finished items as [`Event::Restored`], and removes the VMs of earlier lives.
//!   VM names carry the life, so a late result of an old VM is refused as any stranger's is.

mod budget;
mod compile;
mod event;
mod graph;
mod run;
mod step;

pub use compile::{
    MOST_ATTEMPTS, MOST_PAYLOAD, MOST_STEP_NAME, MOST_STEPS, MOST_TIME, MOST_VMS, MOST_WINDOW, compile, read,
};
pub use event::{Action, Event, ItemResult, Refusal, StepVm, vm_name};
pub use graph::{FAILED, Graph, GuestFile, Next, Step};
pub use run::Run;
