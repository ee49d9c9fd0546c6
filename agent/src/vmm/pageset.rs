//! A set of pages as a bitmap.

use crate::types::Gfn;
use std::ops::Range;

/// A set of the pages of one VM: one bit a page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
}

impl PageSet {
    /// The empty set, for RAM of `pages` pages.
    pub fn new(pages: u32) -> PageSet {
        PageSet {
            words: vec![0; pages.div_ceil(64) as usize],
        }
    }

    /// Empties it.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// Adds a run of pages. Those past the end are ignored.
    pub fn insert(&mut self, run: Range<Gfn>) {
        self.for_words(run, |word, bits| *word |= bits);
    }

    /// Takes a run of pages out.
    pub fn remove(&mut self, run: Range<Gfn>) {
        self.for_words(run, |word, bits| *word &= !bits);
    }

    /// Adds all pages of `other`, a set for the same RAM.
    pub fn extend(&mut self, other: &PageSet) {
        for (word, more) in self.words.iter_mut().zip(&other.words) {
            *word |= more;
        }
    }

    /// Whether a page is in it.
    pub fn contains(&self, gfn: Gfn) -> bool {
        let word = self.words.get(gfn.index() / 64);
        word.is_some_and(|w| w >> (gfn.index() % 64) & 1 == 1)
    }

    /// Number of pages in it.
    pub fn len(&self) -> u64 {
        self.words.iter().map(|w| u64::from(w.count_ones())).sum()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|w| *w == 0)
    }

    /// Takes all pages of `other` out.
    pub fn subtract(&mut self, other: &PageSet) {
        for (word, less) in self.words.iter_mut().zip(&other.words) {
            *word &= !less;
        }
    }

    /// The pages in both.
    pub fn intersection(&self, other: &PageSet) -> PageSet {
        let words = self.words.iter().zip(&other.words);
        PageSet {
            words: words.map(|(a, b)| a & b).collect(),
        }
    }

    /// Empties it and returns what was in it.
    pub fn take(&mut self) -> PageSet {
        let words = vec![0; self.words.len()];
        PageSet {
            words: std::mem::replace(&mut self.words, words),
        }
    }

    /// Its pages by rising gfn.
    pub fn iter(&self) -> impl Iterator<Item = Gfn> + '_ {
        self.pages_in(0, u32::MAX)
    }

    /// Its pages by rising gfn from `start` on, then those before it.
    pub fn iter_from(&self, start: Gfn) -> impl Iterator<Item = Gfn> + '_ {
        self.pages_in(start.0, u32::MAX)
            .chain(self.pages_in(0, start.0))
    }

    fn pages_in(&self, from: u32, to: u32) -> impl Iterator<Item = Gfn> + '_ {
        let first = from as usize / 64;
        let words = self.words.iter().enumerate().skip(first);
        words
            .flat_map(|(i, &word)| {
                let mut left = word;
                std::iter::from_fn(move || {
                    if left == 0 {
                        return None;
                    }
                    let bit = left.trailing_zeros();
                    left &= left - 1;
                    Some(i as u32 * 64 + bit)
                })
            })
            .skip_while(move |&gfn| gfn < from)
            .take_while(move |&gfn| gfn < to)
            .map(Gfn)
    }

    /// Its runs by rising gfn, none adjacent to the next.
    pub fn runs(&self) -> Vec<Range<Gfn>> {
        let mut out: Vec<Range<Gfn>> = Vec::new();
        for (i, word) in self.words.iter().enumerate() {
            let mut left = *word;
            while left != 0 {
                let bit = left.trailing_zeros();
                let n = (left >> bit).trailing_ones();
                left &= !((u64::MAX >> (64 - n)) << bit);
                let start = i as u32 * 64 + bit;
                match out.last_mut() {
                    Some(last) if last.end.0 == start => last.end.0 += n,
                    _ => out.push(Gfn(start)..Gfn(start + n)),
                }
            }
        }
        out
    }

    fn for_words(&mut self, run: Range<Gfn>, mut f: impl FnMut(&mut u64, u64)) {
        let end = run.end.index().min(self.words.len() * 64);
        let mut gfn = run.start.index();
        while gfn < end {
            let (word, bit) = (gfn / 64, gfn % 64);
            let n = (64 - bit).min(end - gfn);
            f(&mut self.words[word], (u64::MAX >> (64 - n)) << bit);
            gfn += n;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn is_a_set(ops in prop::collection::vec((0u32..700, 0u32..200, any::<bool>()), 0..20)) {
            let mut set = PageSet::new(640);
            let mut model = BTreeSet::new();
            for (start, n, add) in ops {
                let run = Gfn(start)..Gfn(start + n);
                let pages = (start..start + n).filter(|g| *g < 640);
                if add {
                    set.insert(run);
                    model.extend(pages);
                } else {
                    set.remove(run);
                    pages.for_each(|g| { model.remove(&g); });
                }
            }
            let runs = set.runs();
            prop_assert!(runs.windows(2).all(|w| w[0].end < w[1].start));
            let got: BTreeSet<u32> = runs.iter().flat_map(|r| r.start.0..r.end.0).collect();
            prop_assert_eq!(set.len(), model.len() as u64);
            prop_assert!((0..700).all(|g| set.contains(Gfn(g)) == model.contains(&g)));
            prop_assert_eq!(set.is_empty(), model.is_empty());
            prop_assert_eq!(got, model);
        }
    }

    proptest! {
        #[test]
        fn set_operations_are_those_of_a_btree_set(ops in prop::collection::vec((0u8..4, 0u32..300), 0..200), start in 0u32..300) {
            let mut set = PageSet::new(300);
            let mut other = PageSet::new(300);
            let mut model = BTreeSet::new();
            let mut other_model = BTreeSet::new();
            for (op, g) in ops {
                match op {
                    0 => { set.insert(Gfn(g)..Gfn(g + 1)); model.insert(g); }
                    1 => { set.remove(Gfn(g)..Gfn(g + 1)); model.remove(&g); }
                    2 => { other.insert(Gfn(g)..Gfn(g + 1)); other_model.insert(g); }
                    _ => {
                        set.insert(Gfn(g)..Gfn((g + 5).min(300)));
                        model.extend(g..(g + 5).min(300));
                    }
                }
            }
            prop_assert_eq!(set.len(), model.len() as u64);
            let want: Vec<u32> = model.range(start..).chain(model.range(..start)).copied().collect();
            prop_assert_eq!(set.iter_from(Gfn(start)).map(|g| g.0).collect::<Vec<_>>(), want);
            let both = set.intersection(&other);
            prop_assert_eq!(both.len(), model.intersection(&other_model).count() as u64);
            let mut union = set.clone();
            union.extend(&other);
            prop_assert_eq!(union.len(), model.union(&other_model).count() as u64);
            union.subtract(&other);
            prop_assert_eq!(union.iter().map(|g| g.0).collect::<Vec<_>>(),
                model.difference(&other_model).copied().collect::<Vec<_>>());
        }
    }
}
