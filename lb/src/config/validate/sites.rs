//! Sites: how they are reached, and where their agents are.

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::super::error::Collector;
use super::super::raw;
use super::super::read::Field;
use super::{unique, unusable};
use crate::datapath::{SitePlan, Tunnel};

pub(super) fn sites(raw: &raw::Raw, errors: &mut Collector) -> (Vec<SitePlan>, BTreeMap<String, String>) {
    let has_tls = raw.tls.is_some();
    let raw = &raw.sites;
    unique("site", raw.iter().map(|site| &site.name), errors);
    let mut sites = Vec::new();
    let mut agents = BTreeMap::new();
    for site in raw {
        let next_hop = site.next_hop.as_ref().and_then(|field| address(field, errors));
        let tunnel = tunnel(site, errors);
        if site.next_hop.is_none() && site.tunnel.is_none() {
            let path = format!("{}.next_hop", site.path);
            errors.push(&site.at, path, "is missing: give next_hop, tunnel, or both");
        }
        let agent = site.agent.as_ref().and_then(|field| agent(field, has_tls, errors));
        let Some(name) = &site.name else { continue };
        if let Some(agent) = agent {
            agents.insert(name.value.clone(), agent);
        }
        // The outer packets' way, where nothing else is said.
        if let Some(next_hop) = next_hop.or(tunnel.map(|tunnel| tunnel.endpoint)) {
            sites.push(SitePlan { name: name.value.clone(), next_hop, tunnel });
        }
    }
    (sites, agents)
}

fn tunnel(site: &raw::Site, errors: &mut Collector) -> Option<Tunnel> {
    let source = site.tunnel_source.as_ref().and_then(|field| Some((address(field, errors)?, field)));
    let Some(field) = &site.tunnel else {
        if let Some(field) = &site.tunnel_source {
            errors.push(&field.at, &field.path, "means something only beside tunnel");
        }
        return None;
    };
    let endpoint = address(field, errors)?;
    if let Some((source, field)) = source
        && source.is_ipv4() != endpoint.is_ipv4()
    {
        let message = format!("{source} is of another family than the tunnel's end {endpoint}");
        errors.push(&field.at, &field.path, message);
    }
    Some(Tunnel { endpoint, source: source.map(|(source, _)| source) })
}

fn address(field: &Field<String>, errors: &mut Collector) -> Option<IpAddr> {
    let text = &field.value;
    let refused = match text.parse::<IpAddr>() {
        Ok(ip) => match unusable(ip) {
            None => return Some(ip),
            Some(why) => format!("{text} is {why}; give the address of the next machine on the way"),
        },
        Err(_) => format!("{text:?} is not an IP address (no port, no prefix length)"),
    };
    errors.push(&field.at, &field.path, refused);
    None
}

fn agent(field: &Field<String>, has_tls: bool, errors: &mut Collector) -> Option<String> {
    let example = format!("such as \"{}://10.2.1.1:7401\"", if has_tls { "https" } else { "http" });
    let text = &field.value;
    let refused = match text.parse::<http::Uri>() {
        Err(_) => format!("{text:?} is not a URL {example}"),
        Ok(url) if !matches!(url.scheme_str(), Some("http" | "https")) => {
            format!("{text:?} starts with neither https:// nor http://; write a URL {example}")
        }
        Ok(url) if url.scheme_str() == Some("https") && !has_tls => {
            format!(
                "{text:?} asks for TLS, and there is no section [tls] with ca, certificate and key: make them with \
                 `migrate pki`"
            )
        }
        Ok(url) if url.scheme_str() == Some("http") && has_tls => {
            format!("{text:?} is without TLS, and there is a section [tls]: write a URL {example}")
        }
        Ok(url) if url.port_u16().is_none_or(|port| port == 0) => {
            format!("{text:?} has no port; write a URL {example}")
        }
        Ok(url) if !matches!(url.path(), "" | "/") || url.query().is_some() => {
            format!("{text:?} goes on after the port; write a URL {example}")
        }
        Ok(_) => return Some(text.trim_end_matches('/').to_owned()),
    };
    errors.push(&field.at, &field.path, refused);
    None
}
