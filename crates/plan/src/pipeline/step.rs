//! The state of one step of a run: its queue, its VMs, and what each VM holds.

use std::collections::{BTreeMap, VecDeque};

use burgeon_api::pipeline::StepView;

/// The place of one VM in a step. Generations of VMs follow each other in it.
#[derive(Debug, Default)]
pub(super) struct Slot {
    pub(super) state: SlotState,
    /// Of the VM that is in the slot, or was last.
    pub(super) generation: u32,
    pub(super) name: String,
    /// The slot stays empty until then.
    pub(super) rest_until_ms: u64,
    /// Items in the VM by order of dispatch.
    pub(super) flights: BTreeMap<u64, u64>,
    /// When the first of them became the first.
    pub(super) oldest_since_ms: u64,
    /// The VM holds a suspect, and gets nothing beside it.
    pub(super) alone: bool,
    /// Items ever given to the slot.
    given: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(super) enum SlotState {
    #[default]
    Empty,
    Starting,
    Ready,
}

impl Slot {
    fn load(&self) -> (usize, u64) {
        (self.flights.len(), self.given)
    }

    /// Empties the slot. What was in the VM comes back, oldest first.
    pub(super) fn vacate(&mut self, rest_until_ms: u64) -> Vec<u64> {
        self.state = SlotState::Empty;
        self.rest_until_ms = rest_until_ms;
        self.alone = false;
        std::mem::take(&mut self.flights).into_values().collect()
    }
}

/// What is given to whom.
pub(super) struct Given {
    pub(super) slot: usize,
    pub(super) flight: u64,
    pub(super) item: u64,
    /// The queue was full before, and is not any more.
    pub(super) made_room: bool,
}

#[derive(Debug)]
pub(super) struct StepState {
    pub(super) slots: Vec<Slot>,
    waiting: VecDeque<u64>,
    suspects: VecDeque<u64>,
    /// The slot that is being emptied for the suspects.
    reserved: Option<usize>,
    window: usize,
    queue_limit: usize,
    flights: u64,
    /// Failed starts and idle losses since the last result.
    pub(super) misfortunes: u32,
    /// Losses of VMs with items before the first result; stays as it is afterwards.
    pub(super) early_losses: u32,
    /// Whether the step ever gave a result.
    pub(super) proven: bool,
    /// The counts that only rise; `waiting`, `running` and `vms_ready` are filled in by `view`.
    pub(super) counts: StepView,
}

impl StepState {
    pub(super) fn new(name: &str, vms: u32, window: u32) -> Self {
        Self {
            slots: (0..vms).map(|_| Slot::default()).collect(),
            waiting: VecDeque::new(),
            suspects: VecDeque::new(),
            reserved: None,
            window: window as usize,
            queue_limit: 4 * window as usize * vms as usize,
            flights: 0,
            misfortunes: 0,
            early_losses: 0,
            proven: false,
            counts: StepView { name: name.to_string(), ..StepView::default() },
        }
    }

    pub(super) fn waiting(&self) -> usize {
        self.waiting.len() + self.suspects.len()
    }

    pub(super) fn running(&self) -> usize {
        self.slots.iter().map(|slot| slot.flights.len()).sum()
    }

    pub(super) fn is_full(&self) -> bool {
        self.waiting() >= self.queue_limit
    }

    pub(super) fn queue(&mut self, item: u64) {
        self.waiting.push_back(item);
    }

    /// Puts back an item that left its VM without a result.
    pub(super) fn queue_again(&mut self, item: u64, suspect: bool) {
        self.counts.retried += 1;
        if suspect {
            self.suspects.push_back(item);
        } else {
            self.waiting.push_front(item);
        }
    }

    pub(super) fn lost(&mut self, slot: usize, rest_until_ms: u64) -> Vec<u64> {
        if self.reserved == Some(slot) {
            self.reserved = None;
        }
        self.slots[slot].vacate(rest_until_ms)
    }

    /// The ready VM with the least to do; among equals the one that has had the least.
    fn least_loaded(&self, fits: impl Fn(usize, &Slot) -> bool) -> Option<usize> {
        self.slots
            .iter()
            .enumerate()
            .filter(|(index, slot)| slot.state == SlotState::Ready && fits(*index, slot))
            .min_by_key(|(_, slot)| slot.load())
            .map(|(index, _)| index)
    }

    /// Takes the next item that some VM has room for, and gives it to that VM. One that does not fit holds up
    /// those behind it: they would keep it waiting for ever.
    pub(super) fn give(&mut self, now_ms: u64, fits: impl Fn(u64) -> bool) -> Option<Given> {
        let was_full = self.is_full();
        let (slot, item) = self.choose(fits)?;
        self.flights += 1;
        let chosen = &mut self.slots[slot];
        if chosen.flights.is_empty() {
            chosen.oldest_since_ms = now_ms;
        }
        chosen.flights.insert(self.flights, item);
        chosen.given += 1;
        Some(Given { slot, flight: self.flights, item, made_room: was_full && !self.is_full() })
    }

    fn choose(&mut self, fits: impl Fn(u64) -> bool) -> Option<(usize, u64)> {
        if let Some(&suspect) = self.suspects.front() {
            if !fits(suspect) {
                return None;
            }
            if let Some(slot) = self.least_loaded(|_, slot| slot.flights.is_empty()) {
                self.suspects.pop_front();
                self.slots[slot].alone = true;
                return Some((slot, suspect));
            }
            // A VM that has a suspect takes the next one too, and a VM that starts will be empty.
            if self.slots.iter().any(|slot| slot.alone || slot.state == SlotState::Starting) {
                self.reserved = None;
            } else if self.reserved.is_none() {
                self.reserved = self.least_loaded(|_, _| true);
            }
        } else {
            self.reserved = None;
        }
        let item = *self.waiting.front()?;
        if !fits(item) {
            return None;
        }
        let (reserved, window) = (self.reserved, self.window);
        let slot =
            self.least_loaded(|index, slot| !slot.alone && Some(index) != reserved && slot.flights.len() < window)?;
        self.waiting.pop_front();
        Some((slot, item))
    }

    /// Takes one item out of a VM that stays.
    pub(super) fn land(&mut self, slot: usize, flight: u64, now_ms: u64) {
        let slot = &mut self.slots[slot];
        let was_oldest = slot.flights.first_key_value().is_some_and(|(first, _)| *first == flight);
        slot.flights.remove(&flight);
        slot.alone &= !slot.flights.is_empty();
        if was_oldest {
            slot.oldest_since_ms = now_ms;
        }
    }

    pub(super) fn view(&self) -> StepView {
        let ready = self.slots.iter().filter(|slot| slot.state == SlotState::Ready).count();
        StepView {
            waiting: self.waiting() as u64,
            running: self.running() as u64,
            vms_ready: u32::try_from(ready).unwrap_or(u32::MAX),
            ..self.counts.clone()
        }
    }
}
