//! The search for an order in which the operations of one key may have taken effect.
//!
//! Wing and Gong's search (*Testing and Verifying Concurrent Objects*, 1993) with Lowe's two ideas (*Testing for
//! linearizability*, 2017): configurations that were seen are not looked at again, and operations are linearized as late as
//! possible. So the history is read once, in the order of time. Between two events stands the *frontier*: all configurations
//! that what happened so far allows, each being the state of the object and which of the operations under way have already
//! taken effect. When an operation returns, those of the frontier in which it has taken effect stay, and from the others every way
//! to let it take effect is tried.
//!
//! Five things keep the frontier small. An observation that fits the state takes effect at once: it changes nothing, so that
//! waiting gains nothing. What was told a version takes effect only after everything that was told a lower one: versions never
//! go back, so that the rest of such an order cannot be completed; and nothing takes effect for which there is no version left. An
//! operation without an answer takes effect only right before one that would not fit without it, or that tells which version the
//! object has without telling its value (after it nothing could take effect any more that is part of that version), and among
//! several that do the same the oldest goes first. The store's clock ([`crate::clock`]) goes forward only when something takes effect
//! that needs it. And a configuration that allows nothing that another does not is dropped.
//!
//! Where many unanswered operations could explain the same answer, a search of limited [`Width`] finds an order all the same if there is
//! one; that there is none is proved by a search that leaves nothing out, of the whole history or of a window of it.

use std::collections::{HashMap, HashSet, VecDeque};

use smallvec::SmallVec;

use crate::clock::{Expiries, Slack};
use crate::limits::{
    MAX_COMPARED, MAX_CONFIGURATIONS, MAX_STEPS, MERGE_EVERY, STEPS_PER_OPERATION,
};
use crate::model::{Action, State};
use crate::op::{NEVER, Nanos, Operation, Outcome, Value};
use crate::seen::Seen;
use crate::unanswered::{Class, forget_expiry, forget_versions, overwrites, written_expiry};

/// One step of a history as the search sees it.
#[derive(Clone, Debug)]
pub(crate) struct Item {
    pub action: Action,
    pub outcome: Option<Outcome>,
    pub invoked: Nanos,
    pub returned: Nanos,
    /// It must take effect, between its times. Otherwise it may, at any time after its invocation; and if it
    /// has an outcome nevertheless, then only with that.
    pub must: bool,
}

impl Item {
    /// An object that was there at the start, and of which nobody knows whether it expires.
    pub const VANISH: Self = Self {
        action: Action::Vanish,
        outcome: None,
        invoked: 0,
        returned: NEVER,
        must: false,
    };

    /// Whether what it writes expires.
    pub const fn expires(&self) -> bool {
        matches!(self.action, Action::Operation(Operation::Write { expires, .. }) if expires != NEVER)
    }
}

/// How a search ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Verdict {
    Linearizable,
    /// This item could not take effect before it returned; the states that were possible before. If not `proved`, configurations had
    /// been left out, and one of them might have gone on.
    Violation {
        item: usize,
        states: Vec<State>,
        proved: bool,
    },
    /// The limits were reached when this item returned.
    GaveUp {
        item: usize,
    },
}

type Words = SmallVec<[u64; 2]>;
type Used = SmallVec<[(u32, u32); 2]>;

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Config {
    state: State,
    /// By slot: which of the operations under way have taken effect.
    done: Words,
    /// How many of each class of unanswered operations have, sorted by class; what has in all configurations is not counted.
    used: Used,
    /// Items that must and were told a version, and have taken effect.
    versions: u32,
}

impl Config {
    fn has(&self, slot: usize) -> bool {
        self.done[slot / 64] >> (slot % 64) & 1 != 0
    }

    fn set(&mut self, slot: usize) {
        self.done[slot / 64] |= 1 << (slot % 64);
    }

    fn clear(&mut self, slot: usize) {
        self.done[slot / 64] &= !(1 << (slot % 64));
    }

    fn used(&self, class: u32) -> u32 {
        self.used
            .iter()
            .find(|(c, _)| *c == class)
            .map_or(0, |(_, n)| *n)
    }

    fn use_one(&mut self, class: u32) {
        match self.used.binary_search_by_key(&class, |(c, _)| *c) {
            Ok(at) => self.used[at].1 += 1,
            Err(at) => self.used.insert(at, (class, 1)),
        }
    }

    fn has_done_no_more(&self, other: &Self) -> bool {
        self.done == other.done && self.used.iter().all(|&(c, n)| n <= other.used(c))
    }
}

struct Search<'a> {
    items: &'a [Item],
    classes: Vec<Class>,
    /// Classes of which some are available.
    active: Vec<u32>,
    /// By item: its class, if it need not take effect.
    class_of: Vec<Option<u32>>,
    /// By item: how many items that must were told a lower version.
    lower: Vec<u32>,
    /// By how many of those that must and were told a version have taken effect: the highest version that the object may have had so
    /// far, if the next one is to be possible.
    bounds: Vec<u64>,
    /// The items under way that must, by slot.
    open: Vec<Option<usize>>,
    /// Some objects expire: then the same value may be there for longer or shorter.
    expiry: bool,
    /// Of what has not returned.
    expiries: Expiries,
    slack: Slack,
    /// How far the store's clock may have come by now.
    may_have_passed: Nanos,
    left: u64,
    width: Width,
    /// Some configuration was not looked at.
    left_out: bool,
}

/// Too much to look at.
struct Exhausted;

/// How many configurations are kept between two events. Most that look different in nothing but which of several unanswered
/// operations took effect lead to the same end, so a few do; only when those get stuck more are needed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Width {
    /// Of those with the same state; and of the ways to help an operation that more unanswered ones than it needs may precede.
    alike: usize,
    all: usize,
}

impl Width {
    /// Everything.
    pub const WHOLE: Self = Self {
        alike: usize::MAX,
        all: usize::MAX,
    };

    /// Less and less is left out.
    pub const STEPS: [Self; 4] = [
        Self { alike: 1, all: 64 },
        Self { alike: 8, all: 512 },
        Self {
            alike: 64,
            all: 4096,
        },
        Self::WHOLE,
    ];
}

/// How much may be looked at for so many items.
pub(crate) const fn generous(items: usize) -> u64 {
    MAX_STEPS + STEPS_PER_OPERATION * items as u64
}

/// Searches an order for `items` that starts with `initial`, looking at no more than `left` configurations, of which it takes
/// off what it looked at.
pub(crate) fn search(
    items: &[Item],
    initial: State,
    slack: Slack,
    left: &mut u64,
    width: Width,
) -> Verdict {
    let mut search = Search::new(items, initial, slack, *left, width);
    let verdict = run(&mut search, items, initial, slack);
    *left = search.left;
    verdict
}

fn run(search: &mut Search<'_>, items: &[Item], initial: State, slack: Slack) -> Verdict {
    let events = events(items);
    let mut frontier = vec![Config {
        state: initial,
        done: SmallVec::from_elem(0, most_open(items, &events).div_ceil(64)),
        used: Used::new(),
        versions: 0,
    }];
    let mut slots = vec![0usize; items.len()];
    let mut free = Vec::new();
    let mut returns = 0u32;
    for event in events {
        let item = event.item;
        if event.returns {
            search.may_have_passed = slack.may_have_passed(event.time);
            if search.expiry {
                for config in &mut frontier {
                    config.state = search.lowered(config.state);
                }
            }
            let slot = slots[item];
            let states = || frontier.iter().map(|c| c.state).collect();
            let next = match search.returned(&frontier, slot) {
                Ok(next) => next,
                Err(Exhausted) => return Verdict::GaveUp { item },
            };
            if next.is_empty() {
                return Verdict::Violation {
                    item,
                    states: states(),
                    proved: !search.left_out,
                };
            }
            frontier = next;
            for config in &mut frontier {
                config.clear(slot);
            }
            search.open[slot] = None;
            search
                .expiries
                .remove(expires_later(&items[item], slack), 1);
            free.push(slot);
            search.tidy(&mut frontier);
            search.narrow(&mut frontier);
            returns += 1;
            if search.active.len() > 1 && returns.is_multiple_of(MERGE_EVERY) {
                search.merge_classes(&mut frontier);
            }
        } else if let Some(class) = search.class_of[item] {
            search.ask(class, event.time);
        } else {
            let slot = free.pop().unwrap_or_else(|| {
                search.open.push(None);
                search.open.len() - 1
            });
            slots[item] = slot;
            search.open[slot] = Some(item);
        }
    }
    Verdict::Linearizable
}

struct Event {
    time: Nanos,
    item: usize,
    returns: bool,
}

/// Invocations and returns in the order of time. At the same instant invocations go first: such operations count as concurrent.
fn events(items: &[Item]) -> Vec<Event> {
    let mut events: Vec<Event> = Vec::with_capacity(2 * items.len());
    for (item, i) in items.iter().enumerate() {
        let event = |time, returns| Event {
            time,
            item,
            returns,
        };
        events.push(event(i.invoked, false));
        if i.must {
            events.push(event(i.returned.max(i.invoked), true));
        }
    }
    events.sort_by_key(|e| (e.time, e.returns, e.item));
    events
}

fn most_open(items: &[Item], events: &[Event]) -> usize {
    let (mut open, mut most) = (0usize, 0);
    for event in events {
        if event.returns {
            open -= 1;
        } else if items[event.item].must {
            open += 1;
            most = most.max(open);
        }
    }
    most
}

impl<'a> Search<'a> {
    fn new(items: &'a [Item], initial: State, slack: Slack, left: u64, width: Width) -> Self {
        let mut versions: Vec<(u64, bool)> = items
            .iter()
            .filter(|i| i.must && version(i) != 0)
            .map(|i| (version(i), !gives_version(i)))
            .collect();
        versions.sort_unstable();
        let lower = items
            .iter()
            .map(|i| versions.partition_point(|(v, _)| *v < version(i)) as u32)
            .collect();
        let bounds = versions
            .iter()
            .map(|&(v, had_before)| v - u64::from(!had_before))
            .chain([u64::MAX])
            .collect();
        let seen = Seen::of(items);
        let ends = items.iter().filter(|i| i.must).map(|i| i.returned).max();
        let end = slack.may_have_passed(ends.unwrap_or(0));
        let mut expiries = Expiries::default();
        for item in items.iter().filter(|i| i.must) {
            expiries.add(expires_later(item, slack));
        }
        let mut classes: Vec<Class> = Vec::new();
        let mut by_effect: HashMap<(Action, Option<Outcome>), u32> = HashMap::new();
        let class_of = items
            .iter()
            .map(|item| {
                if item.must {
                    return None;
                }
                let mut action = seen.simplified(&item.action);
                let clock = slack.passed(item.invoked).max(initial.clock);
                forget_expiry(&mut action, clock, end);
                expiries.add(written_expiry(&action));
                let effect = (action, item.outcome);
                let next = classes.len() as u32;
                let class = *by_effect.entry(effect).or_insert_with_key(|effect| {
                    classes.push(Class {
                        overwrites: overwrites(&effect.0, effect.1.as_ref()),
                        action: effect.0.clone(),
                        outcome: effect.1,
                        asked: VecDeque::new(),
                        alias: None,
                    });
                    next
                });
                Some(class)
            })
            .collect();
        Self {
            items,
            classes,
            active: Vec::new(),
            class_of,
            lower,
            bounds,
            open: Vec::new(),
            expiry: initial.expires != NEVER || items.iter().any(Item::expires),
            expiries,
            slack,
            may_have_passed: 0,
            left,
            width,
            left_out: false,
        }
    }

    /// One more operation of a class may take effect from now on.
    fn ask(&mut self, mut class: u32, time: Nanos) {
        while let Some(alias) = self.classes[class as usize].alias {
            class = alias;
        }
        let c = &mut self.classes[class as usize];
        c.asked.push_back(time);
        if c.asked.len() == 1 {
            self.active.push(class);
        }
    }

    /// The configurations in which the item in `target` has taken effect, and nothing needless after it.
    fn returned(&mut self, frontier: &[Config], target: usize) -> Result<Vec<Config>, Exhausted> {
        let mut next = Vec::new();
        let mut seen = HashSet::new();
        let mut stack = Vec::new();
        for config in frontier {
            if config.has(target) {
                next.push(config.clone());
            } else {
                stack.push(config.clone());
            }
        }
        while let Some(mut config) = stack.pop() {
            self.step()?;
            self.observe(&mut config);
            if config.has(target) {
                next.push(config);
            } else if seen.insert(config.clone()) {
                if seen.len() + next.len() + stack.len() > MAX_CONFIGURATIONS {
                    return Err(Exhausted);
                }
                self.successors(&config, &mut stack)?;
            }
        }
        if next.len() > 1 {
            let mut unique = HashSet::with_capacity(next.len());
            next.retain(|c| unique.insert(c.clone()));
        }
        Ok(next)
    }

    fn step(&mut self) -> Result<(), Exhausted> {
        self.left = self.left.checked_sub(1).ok_or(Exhausted)?;
        Ok(())
    }

    /// Lets every observation under way that fits take effect.
    fn observe(&self, config: &mut Config) {
        for (slot, item) in self.open.iter().enumerate() {
            let Some(item) = *item else { continue };
            if config.has(slot) {
                continue;
            }
            let i = &self.items[item];
            if let Some(outcome) = &i.outcome
                && outcome.is_observation()
                && self.now(&config.state, i.invoked) == config.state
                && config.state.apply(&i.action, Some(outcome)) == Some(config.state)
            {
                config.set(slot);
                config.versions += u32::from(outcome.version() != 0);
            }
        }
    }

    /// The state when something takes effect that was asked for at this time.
    fn now(&self, state: &State, invoked: Nanos) -> State {
        self.lowered(state.at(self.slack.passed(invoked)))
    }

    /// The same, its clock as low as makes no difference.
    fn lowered(&self, mut state: State) -> State {
        state.clock = self.expiries.lowest_like(state.clock);
        state
    }

    /// The states after something was done that was asked for at this time: if the object has not expired before it, and if it has.
    fn after(
        &self,
        state: &State,
        invoked: Nanos,
        action: &Action,
        outcome: Option<&Outcome>,
    ) -> SmallVec<[State; 2]> {
        // Lowered only afterwards: what is written may have expired before it is there.
        let now = state.at(self.slack.passed(invoked));
        let expired = now.expired(self.may_have_passed);
        let mut states = SmallVec::new();
        for before in [Some(now), expired].into_iter().flatten() {
            // For most it makes no difference whether the object had expired.
            let after = before.apply(action, outcome).map(|s| self.lowered(s));
            states.extend(after.filter(|s| !states.iter().any(|o: &State| o.covers(s))));
        }
        states
    }

    /// Every configuration in which one more of the operations under way has taken effect, with the unanswered ones that it needs.
    fn successors(&mut self, config: &Config, into: &mut Vec<Config>) -> Result<(), Exhausted> {
        for slot in 0..self.open.len() {
            let Some(item) = self.open[slot] else {
                continue;
            };
            if config.has(slot) {
                continue;
            }
            let direct = self.apply(config, slot, item);
            let first = direct.first();
            let enough = first.is_some_and(|next| self.is_enough(item, config, next));
            if !enough {
                self.with_help(config, slot, item, &direct, into)?;
            }
            into.extend(direct);
        }
        Ok(())
    }

    /// Whether what takes effect right before `item` may as well do so right after it, or not at all.
    fn is_enough(&self, item: usize, before: &Config, after: &Config) -> bool {
        let i = &self.items[item];
        // It keeps the expiry of what it adds to.
        let keeps = self.expiry && matches!(i.outcome, Some(Outcome::Added { .. }));
        // The object need not have expired if something else made it vanish.
        let waits = after.state.clock > self.now(&before.state, i.invoked).clock;
        !keeps && !waits && !self.settles(item, before, after)
    }

    /// Whether `item` tells something of the object's version that was not known, and not all of the rest: then what took effect
    /// right before it can do so no later, needed by it or not.
    fn settles(&self, item: usize, before: &Config, after: &Config) -> bool {
        let tells = match self.items[item].outcome {
            // Nothing of the value.
            Some(Outcome::Rejected { .. }) => true,
            // Not how long it stays.
            Some(Outcome::Found { .. }) => self.expiry,
            _ => false,
        };
        tells && (before.state.lo, before.state.hi) != (after.state.lo, after.state.hi)
    }

    /// `config` after `item` has taken effect, if it may: the best first.
    fn apply(&self, config: &Config, slot: usize, item: usize) -> SmallVec<[Config; 2]> {
        if !self.in_order(config, item) {
            return SmallVec::new();
        }
        let i = &self.items[item];
        let versions = config.versions + u32::from(version(i) != 0);
        self.after(&config.state, i.invoked, &i.action, i.outcome.as_ref())
            .into_iter()
            .filter(|state| state.lo <= self.bounds[versions as usize])
            .map(|state| {
                let mut next = config.clone();
                next.state = state;
                next.set(slot);
                next.versions = versions;
                next
            })
            .collect()
    }

    /// Whether all that was told a lower version has taken effect.
    fn in_order(&self, config: &Config, item: usize) -> bool {
        let version = version(&self.items[item]);
        version == 0 || config.state.has_version(version) || config.versions == self.lower[item]
    }

    /// Tries which unanswered operations, right before `item`, let it take effect; other than it does without them.
    fn with_help(
        &mut self,
        config: &Config,
        slot: usize,
        item: usize,
        direct: &[Config],
        into: &mut Vec<Config>,
    ) -> Result<(), Exhausted> {
        if self.active.is_empty() || !self.in_order(config, item) || !self.can_be_helped(item) {
            return Ok(());
        }
        let mut seen = HashSet::new();
        // Those that need the fewest first.
        let mut queue = VecDeque::from([(config.clone(), true)]);
        let mut more = 0;
        while let Some((before, first)) = queue.pop_front() {
            for at in 0..self.active.len() {
                let class = self.active[at];
                let c = &self.classes[class as usize];
                // What is overwritten at once need not have happened.
                if c.overwrites && !first {
                    continue;
                }
                let Some(&asked) = c.asked.get(before.used(class) as usize) else {
                    continue;
                };
                for state in self.after(&before.state, asked, &c.action, c.outcome.as_ref()) {
                    if state.lo > self.bounds[before.versions as usize] {
                        continue;
                    }
                    self.step()?;
                    let mut after = before.clone();
                    after.state = state;
                    after.use_one(class);
                    if !seen.insert(after.clone()) {
                        continue;
                    }
                    if seen.len() + into.len() > MAX_CONFIGURATIONS {
                        return Err(Exhausted);
                    }
                    let done = self.apply(&after, slot, item);
                    if let Some(best) = done.first() {
                        let enough = self.is_enough(item, &after, best);
                        let better = |d: &Config| !direct.iter().any(|o| self.covers(o, d));
                        into.extend(done.into_iter().filter(better));
                        if enough {
                            continue;
                        }
                        more += 1;
                        if more >= self.width.alike {
                            self.left_out = true;
                            continue;
                        }
                    }
                    queue.push_back((after, false));
                }
            }
        }
        Ok(())
    }

    /// Whether some unanswered operation could leave what `item` was told.
    fn can_be_helped(&self, item: usize) -> bool {
        let available = || self.active.iter().map(|c| &self.classes[*c as usize]);
        let value = match self.items[item].outcome {
            Some(Outcome::Found { value, .. }) => value,
            Some(Outcome::Absent) => {
                return available().any(|c| match c.action {
                    Action::Operation(Operation::Remove { .. }) | Action::Vanish => true,
                    Action::Operation(Operation::Write { expires, .. }) => {
                        expires <= self.may_have_passed
                    }
                    _ => false,
                });
            }
            _ => return available().next().is_some(),
        };
        available().any(|c| match &c.action {
            Action::Operation(Operation::Write { value: v, .. }) => *v == value,
            Action::Operation(Operation::Increment { .. }) => {
                matches!(value, Value::Number(_))
            }
            _ => false,
        })
    }

    /// Whether `one` allows all that `other` does, now or when its object expires.
    fn covers(&self, one: &Config, other: &Config) -> bool {
        one.has_done_no_more(other)
            && (one.state.covers(&other.state)
                || one
                    .state
                    .expired(self.may_have_passed)
                    .is_some_and(|s| self.lowered(s).covers(&other.state)))
    }

    /// Drops what others cover, and stops counting what has taken effect everywhere.
    fn tidy(&mut self, frontier: &mut Vec<Config>) {
        if frontier.len() > 1 && frontier.len() <= MAX_COMPARED {
            let mut at = 0;
            while at < frontier.len() {
                let covered = (0..frontier.len()).any(|o| {
                    o != at
                        && self.covers(&frontier[o], &frontier[at])
                        && (o < at || !self.covers(&frontier[at], &frontier[o]))
                });
                if covered {
                    frontier.swap_remove(at);
                } else {
                    at += 1;
                }
            }
        }
        let Some((one, others)) = frontier.split_first() else {
            return;
        };
        if one.used.is_empty() {
            return;
        }
        let everywhere: Used = one
            .used
            .iter()
            .map(|&(class, n)| {
                (
                    class,
                    others.iter().map(|c| c.used(class)).fold(n, u32::min),
                )
            })
            .filter(|(_, n)| *n > 0)
            .collect();
        for &(class, n) in &everywhere {
            let c = &mut self.classes[class as usize];
            c.asked.drain(..n as usize);
            self.expiries.remove(written_expiry(&c.action), n as usize);
            for config in frontier.iter_mut() {
                for used in &mut config.used {
                    if used.0 == class {
                        used.1 -= n;
                    }
                }
            }
        }
        for config in frontier {
            config.used.retain(|(_, n)| *n > 0);
        }
        let classes = &self.classes;
        self.active
            .retain(|c| !classes[*c as usize].asked.is_empty());
    }

    /// Keeps what is likeliest to go on: what has used least of what is rare.
    fn narrow(&mut self, frontier: &mut Vec<Config>) {
        let width = self.width;
        if frontier.len() <= width.alike {
            return;
        }
        let before = frontier.len();
        let cost = |config: &Config| -> u64 {
            config
                .used
                .iter()
                .map(|&(class, n)| {
                    u64::from(n) * 1000 / (self.classes[class as usize].asked.len() as u64).max(1)
                })
                .sum()
        };
        frontier.sort_by_cached_key(cost);
        let mut alike: HashMap<(State, Words), usize> = HashMap::new();
        frontier.retain(|config| {
            let n = alike
                .entry((config.state, config.done.clone()))
                .or_insert(0);
            *n += 1;
            *n <= width.alike
        });
        frontier.truncate(width.all);
        self.left_out |= frontier.len() < before;
    }

    /// Makes classes one that have become the same since versions have gone on.
    fn merge_classes(&mut self, frontier: &mut [Config]) {
        let least = |of: fn(&State) -> u64| frontier.iter().map(|c| of(&c.state)).min();
        let (Some(lowest), Some(clock)) = (least(|s| s.lo), least(|s| s.clock)) else {
            return;
        };
        let mut by_effect: HashMap<(Action, Option<Outcome>), u32> = HashMap::new();
        for class in std::mem::take(&mut self.active) {
            let c = &mut self.classes[class as usize];
            let expires = written_expiry(&c.action);
            forget_versions(&mut c.action, lowest);
            if forget_expiry(&mut c.action, clock, NEVER) {
                self.expiries.remove(expires, c.asked.len());
            }
            c.overwrites = overwrites(&c.action, c.outcome.as_ref());
            let into = *by_effect
                .entry((c.action.clone(), c.outcome))
                .or_insert(class);
            if into == class {
                self.active.push(class);
                continue;
            }
            c.alias = Some(into);
            let asked = std::mem::take(&mut c.asked);
            let all = &mut self.classes[into as usize].asked;
            all.extend(asked);
            all.make_contiguous().sort_unstable();
            for config in &mut *frontier {
                let used = config.used(class);
                config.used.retain(|(c, _)| *c != class);
                for _ in 0..used {
                    config.use_one(into);
                }
            }
        }
    }
}

/// The same of an item, which has expired if it had in any case when the item was asked for.
const fn expires_later(item: &Item, slack: Slack) -> Nanos {
    let expires = written_expiry(&item.action);
    if expires <= slack.passed(item.invoked) {
        return NEVER;
    }
    expires
}

fn version(item: &Item) -> u64 {
    item.outcome.as_ref().map_or(0, Outcome::version)
}

/// Whether the version that was told is that of a change, so that it was nobody's before.
const fn gives_version(item: &Item) -> bool {
    matches!(
        item.outcome,
        Some(Outcome::Written { .. } | Outcome::Added { .. })
    )
}
