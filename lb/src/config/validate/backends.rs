//! Backends: their addresses, sites and weights.

use std::collections::HashMap;
use std::net::SocketAddr;

use super::super::Datapath;
use super::super::error::Collector;
use super::super::raw;
use super::services::Modes;
use super::{bounded, endpoint, unique};
use crate::datapath::{BackendPlan, Mode, SitePlan};

/// The weight of a backend that says nothing of it.
const WEIGHT: u64 = 100;
/// The most that it may say.
const WEIGHT_MOST: u64 = 1000;

pub(super) fn backends(
    raw: &raw::Raw,
    sites: &[SitePlan],
    datapath: &Datapath,
    modes: &Modes,
    errors: &mut Collector,
) -> Vec<BackendPlan> {
    unique("backend", raw.backends.iter().map(|backend| &backend.name), errors);
    let plans: HashMap<&str, &SitePlan> = sites.iter().map(|site| (&*site.name, site)).collect();
    let known: HashMap<&str, Option<&SitePlan>> = raw
        .sites
        .iter()
        .flat_map(|site| &site.name)
        .map(|name| (&*name.value, plans.get(&*name.value).copied()))
        .collect();
    // A prefix that was given and not understood has its error already.
    let nat = [raw.datapath.nat_source4.is_some(), raw.datapath.nat_source6.is_some()];
    let mut taken: HashMap<SocketAddr, usize> = HashMap::new();
    let mut plans = Vec::new();
    for backend in &raw.backends {
        let modes = backend.name.as_ref().map(|name| modes.of(&name.value)).unwrap_or_default();
        let address = backend.address.as_ref().and_then(|field| {
            let address = endpoint(field, datapath, errors)?;
            // Servers behind dsr are bound to the service's address, all of them.
            let first =
                if modes == [Mode::Dsr] { None } else { taken.insert(address, errors.line(&field.at)) };
            if let Some(first) = first {
                let message = format!("{address} is already the address of the backend in line {first}");
                errors.push(&field.at, &field.path, message);
            }
            let [nat4, nat6] = nat;
            let missing = match address {
                SocketAddr::V4(_) => (!nat4).then_some("nat_source4"),
                SocketAddr::V6(_) => (!nat6).then_some("nat_source6"),
            };
            if let Some(missing) = missing
                && (modes.is_empty() || modes.contains(&Mode::Nat))
            {
                let message = format!("{address} needs datapath.{missing}: addresses for packets to it");
                errors.push(&field.at, &field.path, message);
            }
            Some(address)
        });
        if let Some(field) = &backend.site {
            match known.get(&*field.value) {
                None => errors.push(&field.at, &field.path, format!("there is no site {:?}", field.value)),
                Some(Some(site)) if modes.contains(&Mode::Dsr) => {
                    let why = match site.tunnel {
                        None => "has no tunnel",
                        Some(_) if address.is_none_or(|address| site.carries(address.ip())) => "",
                        Some(_) => "has an IPv4 tunnel, which does not carry the backend's IPv6",
                    };
                    if !why.is_empty() {
                        let message = format!(
                            "site {:?} {why}: mode = \"dsr\" puts packets into the site's tunnel",
                            field.value
                        );
                        errors.push(&field.at, &field.path, message);
                    }
                }
                Some(_) => {}
            }
        }
        let weight = bounded(&backend.weight, 1..=WEIGHT_MOST, WEIGHT, errors);
        if let (Some(name), Some(address), Some(site)) = (&backend.name, address, &backend.site) {
            plans.push(BackendPlan {
                name: name.value.clone(),
                address,
                site: site.value.clone(),
                weight: u32::try_from(weight).expect("bounded to 1000"),
                drain: backend.drain.as_ref().is_some_and(|drain| drain.value),
            });
        }
    }
    plans
}
