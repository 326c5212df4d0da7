//! Who gets new flows: weights, drains, health and slow start. Pure: now is an argument.
//!
//! ```text
//! drained, by the file or by hand ----> nothing
//! down --------------------------------> nothing, unless all of the service are and it fails open
//! came back or was added lately -------> a tenth, growing to all of its weight over slow_start
//! otherwise ---------------------------> its weight
//! ```

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;
use tokio::time::Instant;

use crate::datapath::{AllDown, Plan, ServicePlan};

/// Effective weights are configured ones times this, so that a tenth of 1 is still something.
const SCALE: u32 = 1000;
/// A slow start begins with a tenth and grows by a twentieth at a time: each step moves few flows to come, and
/// rings are not computed all the time.
const FIRST: u32 = SCALE / 10;
const STEPS: u32 = 18;

/// What is known of one backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// Weight in the configuration.
    weight: u32,
    /// The configuration wants no new flows on it.
    drained_by_file: bool,
    /// Somebody wants no new flows on it.
    drained_by_hand: bool,
    /// What the health checks say last; up where there are none.
    up: bool,
    /// When it last came back or was added; `None`: before this daemon.
    since: Option<Instant>,
}

impl Standing {
    /// Whether it gets no new flows by somebody's wish.
    pub fn is_drained(&self) -> bool {
        self.drained_by_file || self.drained_by_hand
    }

    /// Whether that wish is the configuration's.
    pub fn is_drained_by_file(&self) -> bool {
        self.drained_by_file
    }

    /// Whether it is up.
    pub fn is_up(&self) -> bool {
        self.up
    }
}

/// What is known of all backends, and the services that they are in.
#[derive(Clone, Debug, Default)]
pub struct Shares {
    services: HashMap<String, ServicePlan>,
    backends: HashMap<String, Standing>,
    /// Names of a backend's services.
    services_of: HashMap<String, Vec<String>>,
    /// Backends that may be in a slow start.
    starting: BTreeSet<String>,
}

impl Shares {
    /// Everything up and on its full share, except for what was drained by hand before.
    pub fn new(plan: &Plan, drained: &[String]) -> Self {
        let mut shares = Self::default();
        shares.take(plan, None);
        for name in drained {
            if let Some(standing) = shares.backends.get_mut(name) {
                standing.drained_by_hand = true;
            }
        }
        shares
    }

    /// What another plan makes of it: backends that it keeps keep their standing, those that it adds start slowly.
    pub fn replanned(&self, plan: &Plan, now: Instant) -> Self {
        let (backends, starting) = (self.backends.clone(), self.starting.clone());
        let mut next = Self { backends, starting, ..Self::default() };
        next.take(plan, Some(now));
        next
    }

    /// Takes what another one, of which this was made by [`Self::replanned`], has been told since then.
    pub fn catch_up(&mut self, told: &Self) {
        for (name, standing) in &mut self.backends {
            if let Some(Standing { drained_by_hand, up, since, .. }) = told.backends.get(name).copied() {
                *standing = Standing { drained_by_hand, up, since, ..*standing };
            }
        }
        let known = told.starting.iter().filter(|name| self.backends.contains_key(*name));
        self.starting.extend(known.cloned());
    }

    fn take(&mut self, plan: &Plan, added: Option<Instant>) {
        let mut former = std::mem::take(&mut self.backends);
        for backend in &plan.backends {
            let (name, standing) = former.remove_entry(&backend.name).unwrap_or_else(|| {
                if added.is_some() {
                    self.starting.insert(backend.name.clone());
                }
                let standing = Standing {
                    weight: 0,
                    drained_by_file: false,
                    drained_by_hand: false,
                    up: true,
                    since: added,
                };
                (backend.name.clone(), standing)
            });
            let standing = Standing { weight: backend.weight, drained_by_file: backend.drain, ..standing };
            self.backends.insert(name, standing);
        }
        self.starting.retain(|name| self.backends.contains_key(name));
        self.services_of.clear();
        for service in &plan.services {
            for backend in &service.backends {
                self.services_of.entry(backend.clone()).or_default().push(service.name.clone());
            }
        }
        self.services = plan.services.iter().map(|service| (service.name.clone(), service.clone())).collect();
    }

    /// What is known of a backend.
    pub fn standing(&self, backend: &str) -> Option<Standing> {
        self.backends.get(backend).copied()
    }

    /// The services that a backend is in.
    pub fn services_of(&self, backend: &str) -> &[String] {
        self.services_of.get(backend).map_or(&[], Vec::as_slice)
    }

    /// The health checks say that a backend is up or down; whether that is news.
    pub fn set_health(&mut self, backend: &str, up: bool, now: Instant) -> bool {
        let Some(standing) = self.backends.get_mut(backend).filter(|standing| standing.up != up) else {
            return false;
        };
        standing.up = up;
        if up {
            standing.since = Some(now);
            self.starting.insert(backend.to_owned());
        }
        true
    }

    /// Somebody wants no new flows on a backend, or wants them again; whether that is news.
    pub fn set_drained(&mut self, backend: &str, drained: bool, now: Instant) -> bool {
        let Some(standing) =
            self.backends.get_mut(backend).filter(|standing| standing.drained_by_hand != drained)
        else {
            return false;
        };
        standing.drained_by_hand = drained;
        if !drained {
            standing.since = Some(now);
            self.starting.insert(backend.to_owned());
        }
        true
    }

    /// A service with its backends' effective weights.
    pub fn weighed(&self, service: &str, now: Instant) -> Option<ServicePlan> {
        let mut plan = self.services.get(service)?.clone();
        plan.weights = self.weights(&plan, now);
        Some(plan)
    }

    /// The effective weights of a service's backends, in their order.
    pub fn weights(&self, service: &ServicePlan, now: Instant) -> Vec<u32> {
        let standings: Vec<Option<&Standing>> =
            service.backends.iter().map(|name| self.backends.get(name)).collect();
        let wanted = |standing: &&Standing| !standing.is_drained();
        let all_down = !standings.iter().flatten().copied().filter(wanted).any(|standing| standing.up);
        let open = all_down && service.all_down == AllDown::Open;
        let weight = |standing: &Standing| match standing {
            standing if standing.is_drained() => 0,
            standing if open => standing.weight * SCALE,
            standing if !standing.up => 0,
            standing => standing.weight * portion(standing.since, now, service.slow_start),
        };
        standings.into_iter().map(|standing| standing.map_or(0, weight)).collect()
    }

    /// Services in which a backend's share still grows. Forgets the backends whose slow start is over.
    pub fn growing(&mut self, now: Instant) -> BTreeSet<String> {
        let mut growing = BTreeSet::new();
        let (services, services_of, backends) = (&self.services, &self.services_of, &self.backends);
        self.starting.retain(|backend| {
            let since = backends.get(backend).and_then(|standing| standing.since);
            let mut grows = false;
            for name in services_of.get(backend).into_iter().flatten() {
                let Some(service) = services.get(name).filter(|service| !service.slow_start.is_zero()) else {
                    continue;
                };
                // Once more after the last step, which may have been missed.
                growing.insert(name.clone());
                grows |= portion(since, now, service.slow_start) < SCALE;
            }
            grows
        });
        growing
    }
}

/// The part of its weight that a backend gets, in thousandths.
fn portion(since: Option<Instant>, now: Instant, slow_start: Duration) -> u32 {
    let Some(since) = since else { return SCALE };
    let elapsed = now.saturating_duration_since(since);
    if elapsed >= slow_start {
        return SCALE;
    }
    let step = elapsed.as_micros() * u128::from(STEPS) / slow_start.as_micros().max(1);
    let step = u32::try_from(step).unwrap_or(STEPS).min(STEPS);
    FIRST + (SCALE - FIRST) * step / STEPS
}

#[cfg(test)]
#[path = "shares_tests.rs"]
mod tests;
