//! A bounded table that forgets what was used the longest time ago.

use std::{
    collections::{BTreeMap, HashMap},
    hash::Hash,
};

pub(super) struct Cache<K, V> {
    entries: HashMap<K, (V, usize, u64)>,
    /// By last use.
    order: BTreeMap<u64, K>,
    uses: u64,
    weight: usize,
    most: usize,
}

impl<K: Copy + Eq + Hash, V: Clone> Cache<K, V> {
    /// Holds entries whose weights add up to `most`.
    pub(super) fn new(most: usize) -> Self {
        Cache { entries: HashMap::new(), order: BTreeMap::new(), uses: 0, weight: 0, most }
    }

    pub(super) fn get(&mut self, key: &K) -> Option<V> {
        let (value, _, used) = self.entries.get_mut(key)?;
        self.uses += 1;
        self.order.remove(used);
        *used = self.uses;
        self.order.insert(self.uses, *key);
        Some(value.clone())
    }

    pub(super) fn remove(&mut self, key: &K) {
        if let Some((_, weight, used)) = self.entries.remove(key) {
            self.order.remove(&used);
            self.weight -= weight;
        }
    }

    pub(super) fn put(&mut self, key: K, value: V, weight: usize) {
        if weight > self.most {
            return;
        }
        self.uses += 1;
        if let Some((_, old, used)) = self.entries.insert(key, (value, weight, self.uses)) {
            self.order.remove(&used);
            self.weight -= old;
        }
        self.order.insert(self.uses, key);
        self.weight += weight;
        while self.weight > self.most {
            let Some((_, oldest)) = self.order.pop_first() else { return };
            if let Some((_, weight, _)) = self.entries.remove(&oldest) {
                self.weight -= weight;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_unused_goes_first() {
        let mut cache = Cache::new(10);
        for key in 0..4 {
            cache.put(key, key, 3);
        }
        assert_eq!(cache.get(&0), None);
        assert_eq!(cache.get(&1), Some(1));
        cache.put(4, 4, 3);
        assert_eq!((cache.get(&2), cache.get(&1), cache.get(&4)), (None, Some(1), Some(4)));
        cache.put(5, 5, 11);
        assert_eq!(cache.get(&5), None, "what is larger than all of it is not kept");
        cache.put(4, 7, 10);
        assert_eq!((cache.get(&4), cache.get(&1), cache.order.len()), (Some(7), None, 1));
        cache.remove(&4);
        assert_eq!((cache.get(&4), cache.weight, cache.order.len()), (None, 0, 0));
    }
}
