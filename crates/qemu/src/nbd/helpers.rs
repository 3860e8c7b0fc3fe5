//! A few threads for what has to wait, started when there is work and ended when there is none.

use std::{
    collections::VecDeque,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

type Work = Box<dyn FnOnce() + Send>;

const MOST_THREADS: usize = 8;
/// Work that waits; whoever brings more waits as well.
const MOST_WAITING: usize = 64;
const IDLE: Duration = Duration::from_secs(5);

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Work>,
    threads: usize,
    idle: usize,
}

/// See the module. Cheap to clone.
#[derive(Clone, Default)]
pub(super) struct Helpers {
    shared: Arc<(Mutex<Queue>, Condvar, Condvar)>,
}

impl Helpers {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the work done soon; in the calling thread where no other can be had.
    pub(super) fn run(&self, work: Work) {
        let (_, more, room) = &*self.shared;
        let mut queue = self.queue();
        while queue.waiting.len() >= MOST_WAITING {
            queue = room.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        queue.waiting.push_back(work);
        if queue.idle >= queue.waiting.len() || queue.threads == MOST_THREADS {
            more.notify_one();
            return;
        }
        let helpers = self.clone();
        if thread::Builder::new().name("nbd helper".into()).spawn(move || helpers.serve()).is_ok() {
            queue.threads += 1;
        } else if queue.threads == 0
            && let Some(work) = queue.waiting.pop_back()
        {
            drop(queue);
            work();
        }
    }

    fn serve(&self) {
        let (_, more, room) = &*self.shared;
        let mut queue = self.queue();
        loop {
            if let Some(work) = queue.waiting.pop_front() {
                room.notify_one();
                drop(queue);
                work();
                queue = self.queue();
                continue;
            }
            queue.idle += 1;
            let (guard, waited) = more.wait_timeout(queue, IDLE).unwrap_or_else(PoisonError::into_inner);
            queue = guard;
            queue.idle -= 1;
            if waited.timed_out() && queue.waiting.is_empty() {
                queue.threads -= 1;
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn all_work_is_done_and_none_waits_for_what_waits() {
        let helpers = Helpers::default();
        let (done, finished) = mpsc::channel();
        let (release, held) = mpsc::channel::<()>();
        helpers.run(Box::new(move || assert!(held.recv().is_err())));
        for number in 0..200 {
            let done = done.clone();
            helpers.run(Box::new(move || done.send(number).unwrap()));
        }
        let mut numbers: Vec<i32> = (0..200).map(|_| finished.recv_timeout(Duration::from_secs(10)).unwrap()).collect();
        numbers.sort_unstable();
        assert_eq!(numbers, (0..200).collect::<Vec<_>>());
        drop(release);
    }
}
