//! One read for all who want the same chunk at the same time.

use std::{
    collections::HashMap,
    sync::{Arc, Condvar, Mutex, PoisonError},
};

use burgeon_api::{Error, Result};
use bytes::Bytes;

use super::lock;
use crate::ChunkId;

#[derive(Default)]
struct Flight {
    outcome: Mutex<Option<Result<Bytes>>>,
    landed: Condvar,
}

#[derive(Default)]
pub(super) struct Flights {
    under_way: Mutex<HashMap<ChunkId, Arc<Flight>>>,
}

/// Who reads, and lands the flight whatever happens, so that nobody waits for ever.
pub(super) struct Pilot<'a> {
    flights: &'a Flights,
    id: ChunkId,
    flight: Arc<Flight>,
}

impl Pilot<'_> {
    /// The first outcome counts.
    pub(super) fn land(&self, outcome: Result<Bytes>) {
        let mut landed = lock(&self.flight.outcome);
        if landed.is_some() {
            return;
        }
        *landed = Some(outcome);
        drop(landed);
        lock(&self.flights.under_way).remove(&self.id);
        self.flight.landed.notify_all();
    }
}

impl Drop for Pilot<'_> {
    fn drop(&mut self) {
        self.land(Err(Error::internal("the one who read the chunk has panicked")));
    }
}

/// Somebody else's flight.
pub(super) struct Ticket(Arc<Flight>);

impl Ticket {
    pub(super) fn wait(&self) -> Result<Bytes> {
        let mut outcome = lock(&self.0.outcome);
        loop {
            if let Some(outcome) = &*outcome {
                return outcome.clone();
            }
            outcome = self.0.landed.wait(outcome).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// To read, or to wait for who reads. Who has several reads first, and lands them all, before waiting for others: else
/// two could wait for each other.
pub(super) enum Boarded<'a> {
    Reads(Pilot<'a>),
    Waits(Ticket),
}

impl Flights {
    pub(super) fn board(&self, id: ChunkId) -> Boarded<'_> {
        let mut under_way = lock(&self.under_way);
        if let Some(flight) = under_way.get(&id).cloned() {
            return Boarded::Waits(Ticket(flight));
        }
        let flight = Arc::new(Flight::default());
        under_way.insert(id, flight.clone());
        Boarded::Reads(Pilot { flights: self, id, flight })
    }

    /// Runs `read`, or waits for the one who does.
    pub(super) fn share(&self, id: ChunkId, read: impl FnOnce() -> Result<Bytes>) -> Result<Bytes> {
        match self.board(id) {
            Boarded::Waits(ticket) => ticket.wait(),
            Boarded::Reads(pilot) => {
                let outcome = read();
                pilot.land(outcome.clone());
                outcome
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicU32, Ordering},
        time::Duration,
    };

    use super::*;

    #[test]
    fn one_reads_and_all_get_it() {
        let flights = Flights::default();
        let reads = AtomicU32::new(0);
        let id = ChunkId([7; 32]);
        let (release, held) = std::sync::mpsc::channel::<()>();
        std::thread::scope(|scope| {
            let first = scope.spawn(|| {
                flights.share(id, move || {
                    held.recv_timeout(Duration::from_secs(10)).unwrap();
                    Ok(Bytes::from_static(b"once"))
                })
            });
            while lock(&flights.under_way).is_empty() {
                std::thread::yield_now();
            }
            let others: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| {
                        flights.share(id, || {
                            reads.fetch_add(1, Ordering::Relaxed);
                            Ok(Bytes::from_static(b"again"))
                        })
                    })
                })
                .collect();
            // One of the waiting is enough to tell: the flight has three owners then.
            while lock(&flights.under_way).get(&id).is_some_and(|flight| Arc::strong_count(flight) < 6) {
                std::thread::yield_now();
            }
            release.send(()).unwrap();
            assert_eq!(first.join().unwrap().unwrap(), "once");
            for other in others {
                assert_eq!(other.join().unwrap().unwrap(), "once");
            }
        });
        assert_eq!(reads.load(Ordering::Relaxed), 0);
        assert!(flights.share(id, || Err(Error::internal("no"))).is_err());
        assert!(lock(&flights.under_way).is_empty());
    }
}
