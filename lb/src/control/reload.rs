//! Another plan takes the place of the present one, by what differs.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError};
use tokio::time::Instant;

use serde::{Deserialize, Serialize};

use super::entry::{Entry, Table};
use super::{Control, ControlError, Shares, State, lock};
use crate::config;
use crate::datapath::{BackendPlan, Plan, ServicePlan, SiteNumber};

/// What a plan has otherwise than another one, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changes {
    /// Only the new one has these: `service chat`, `backend chat-1`, `site ams`.
    pub added: Vec<String>,
    /// Only the old one has these.
    pub removed: Vec<String>,
    /// Both have these, and not the same.
    pub changed: Vec<String>,
}

impl Changes {
    /// What `new` has otherwise than `old`.
    pub fn between(old: &Plan, new: &Plan) -> Self {
        let mut changes = Self::default();
        changes.compare("service", &old.services, &new.services, |service| &service.name);
        changes.compare("backend", &old.backends, &new.backends, |backend| &backend.name);
        changes.compare("site", &old.sites, &new.sites, |site| &site.name);
        changes
    }

    /// Whether the two are the same.
    pub fn is_empty(&self) -> bool {
        self.added.is_empty() && self.removed.is_empty() && self.changed.is_empty()
    }

    fn compare<T: PartialEq>(&mut self, what: &str, old: &[T], new: &[T], name: impl Fn(&T) -> &String) {
        let say = |thing: &T| format!("{what} {}", name(thing));
        let mut former: BTreeMap<&String, &T> = old.iter().map(|thing| (name(thing), thing)).collect();
        for thing in new {
            match former.remove(name(thing)) {
                None => self.added.push(say(thing)),
                Some(known) if known != thing => self.changed.push(say(thing)),
                Some(_) => {}
            }
        }
        self.removed.extend(former.into_values().map(say));
    }
}

/// The plan with effective weights.
pub(super) fn weighed(plan: &Plan, shares: &Shares, now: Instant) -> Plan {
    let weigh =
        |service: &ServicePlan| ServicePlan { weights: shares.weights(service, now), ..service.clone() };
    Plan {
        sites: plan.sites.clone(),
        backends: plan.backends.clone(),
        services: plan.services.iter().map(weigh).collect(),
    }
}

impl Control {
    /// Installs another plan. Backends that both plans have at the same address go on undisturbed, held ones too;
    /// one whose packets are held, or that `is_moving`, is neither removed nor given another address. Refused,
    /// nothing has changed. May take as long as the datapath needs to find new sites.
    pub fn replan(
        &self,
        plan: &Plan,
        hold: config::Hold,
        is_moving: impl Fn(&str) -> bool,
    ) -> Result<(), ControlError> {
        let _installing = lock(&self.installing);
        let former = self.table();
        let stay: BTreeMap<&String, &BackendPlan> =
            plan.backends.iter().map(|backend| (&backend.name, backend)).collect();
        let stays = |entry: &&Arc<Entry>| {
            stay.get(&entry.name).is_some_and(|backend| backend.address == entry.address)
        };
        let leaving: Vec<&Arc<Entry>> = former.entries.values().filter(|entry| !stays(entry)).collect();
        let result = check_sites(plan, &former, &stay)
            .and_then(|()| take_away(&leaving, is_moving))
            .and_then(|()| self.replace(plan, hold, &former));
        if result.is_err() {
            leaving.iter().for_each(|entry| entry.set_gone(false));
        }
        result
    }

    fn replace(&self, plan: &Plan, hold: config::Hold, former: &Table) -> Result<(), ControlError> {
        let now = Instant::now();
        // On a copy: the shares are asked for and told news meanwhile.
        let mut shares = lock(&self.shares).replanned(plan, now);
        self.datapath.install(&weighed(plan, &shares, now))?;
        {
            let mut told = lock(&self.shares);
            shares.catch_up(&told);
            *told = shares;
        }
        let table = Table::new(&*self.datapath, plan, Some(former), hold)?;
        *self.table.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(table);
        *lock(&self.hold) = hold;
        // What health said while the tables were written was weighed for the former plan.
        let services: BTreeSet<String> = plan.services.iter().map(|service| service.name.clone()).collect();
        lock(&self.stale).retain(|service| services.contains(service));
        self.reshare.notify_one();
        Ok(())
    }
}

/// Makes sure that nothing is decided about backends any more, unless one is held or moving.
fn take_away(leaving: &[&Arc<Entry>], is_moving: impl Fn(&str) -> bool) -> Result<(), ControlError> {
    for entry in leaving {
        // First gone, then looked at: no hold begins in between.
        entry.set_gone(true);
        let state = entry.machine().state();
        let state = if is_moving(&entry.name) { "in a migration" } else { state.label() };
        if state != State::Forward.label() {
            return Err(ControlError::InUse { backend: entry.name.clone(), state });
        }
    }
    Ok(())
}

/// Refuses to forget a site where a backend runs that stays.
fn check_sites(
    plan: &Plan,
    former: &Table,
    stay: &BTreeMap<&String, &BackendPlan>,
) -> Result<(), ControlError> {
    let kept: BTreeSet<&String> = plan.sites.iter().map(|site| &site.name).collect();
    let lost: BTreeMap<SiteNumber, &String> =
        former.sites.iter().filter(|(name, _)| !kept.contains(name)).map(|(name, n)| (*n, name)).collect();
    if lost.is_empty() {
        return Ok(());
    }
    for entry in former.entries.values().filter(|entry| stay.contains_key(&entry.name)) {
        if let Some(site) = lost.get(&entry.machine().location()) {
            return Err(ControlError::SiteInUse { site: (*site).clone(), backend: entry.name.clone() });
        }
    }
    Ok(())
}
