//! Health checks: a service's, and what a backend has otherwise.

use std::collections::HashMap;
use std::ops::RangeInclusive;
use std::time::Duration;

use super::super::check::{Check, CheckPlan, Probe};
use super::super::error::Collector;
use super::super::raw;
use super::super::read::Field;
use super::{bounded, choice};
use crate::datapath::{Protocol, ServicePlan};

/// More would be fragmented on the way.
const DATAGRAM_MOST: usize = 1400;

/// What `type` says.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    None,
    Tcp,
    Http,
    Udp,
}

/// The checks of all backends, in the order of services and their backends.
pub(super) fn checks(raw: &raw::Raw, services: &[ServicePlan], errors: &mut Collector) -> Vec<CheckPlan> {
    let own: HashMap<&str, &raw::Check> = raw
        .backends
        .iter()
        .filter_map(|backend| Some((&*backend.name.as_ref()?.value, backend.check.as_ref()?)))
        .collect();
    let of_service: HashMap<&str, &raw::Check> = raw
        .services
        .iter()
        .filter_map(|service| Some((&*service.name.as_ref()?.value, service.check.as_ref()?)))
        .collect();
    let mut found: HashMap<&str, Vec<(Check, &str)>> = HashMap::new();
    let mut order = Vec::new();
    for service in services {
        let common = of_service.get(&*service.name).copied();
        // Once for the service's own mistakes, and for all backends that have nothing of their own.
        let plain = common.and_then(|common| check(common, service.protocol, errors));
        for backend in &service.backends {
            let check = match own.get(&**backend) {
                Some(own) => check(&merged(own, common), service.protocol, errors),
                None => plain.clone(),
            };
            let Some(check) = check else { continue };
            let known = found.entry(backend).or_default();
            if !known.iter().any(|(other, _)| *other == check) {
                known.push((check.clone(), &service.name));
                order.push(CheckPlan { backend: backend.clone(), service: service.name.clone(), check });
            }
        }
    }
    order
}

/// The backend's fields, and the service's where it has none.
fn merged(own: &raw::Check, common: Option<&raw::Check>) -> raw::Check {
    let Some(common) = common else { return own.clone() };
    // Another kind of probe has nothing to do with the fields of the service's one.
    let same_kind = own
        .kind
        .as_ref()
        .is_none_or(|own| common.kind.as_ref().is_some_and(|common| common.value == own.value));
    let probe = if same_kind { common.clone() } else { raw::Check::default() };
    let own = own.clone();
    raw::Check {
        at: own.at,
        path: own.path,
        kind: own.kind.or(probe.kind),
        interval_ms: own.interval_ms.or_else(|| common.interval_ms.clone()),
        timeout_ms: own.timeout_ms.or_else(|| common.timeout_ms.clone()),
        rise: own.rise.or_else(|| common.rise.clone()),
        fall: own.fall.or_else(|| common.fall.clone()),
        http_path: own.http_path.or(probe.http_path),
        http_status: own.http_status.or(probe.http_status),
        http_host: own.http_host.or(probe.http_host),
        send: own.send.or(probe.send),
        send_hex: own.send_hex.or(probe.send_hex),
        expect: own.expect.or(probe.expect),
        expect_hex: own.expect_hex.or(probe.expect_hex),
        resets_per_s: own.resets_per_s.or_else(|| common.resets_per_s.clone()),
    }
}

/// A check, or `None` where there is nothing to check or something is wrong.
fn check(raw: &raw::Check, protocol: Protocol, errors: &mut Collector) -> Option<Check> {
    let kinds = [("tcp", Kind::Tcp), ("http", Kind::Http), ("udp", Kind::Udp), ("none", Kind::None)];
    let kind = match (&raw.kind, protocol) {
        (Some(_), _) => choice(&raw.kind, &kinds, Kind::None, errors),
        (None, Protocol::Tcp) => Kind::Tcp,
        (None, Protocol::Udp) => {
            let message = "is missing: a udp service is checked with \"udp\", \"http\", \"tcp\" or \"none\"";
            errors.push(&raw.at, format!("{}.type", raw.path), message);
            return None;
        }
    };
    foreign_fields(raw, kind, errors);
    let probe = match kind {
        Kind::None => None,
        Kind::Tcp => Some(Probe::Tcp),
        Kind::Http => Some(http(raw, errors)),
        Kind::Udp => Some(udp(raw, errors)?),
    };
    let interval_ms = bounded(&raw.interval_ms, 100..=3_600_000, 2000, errors);
    let timeout_ms = bounded(&raw.timeout_ms, 1..=60_000, interval_ms.min(1000), errors);
    if let Some(field) = &raw.timeout_ms
        && timeout_ms > interval_ms
    {
        let message = format!("{timeout_ms} is more than interval_ms, which is {interval_ms}");
        errors.push(&field.at, &field.path, message);
    }
    let count = |field, default, errors: &mut Collector| {
        u32::try_from(bounded(field, 1..=100, default, errors)).expect("bounded to 100")
    };
    let resets = raw.resets_per_s.is_some().then(|| {
        u32::try_from(bounded(&raw.resets_per_s, 1..=u32::MAX.into(), 1, errors)).expect("bounded to 32 bits")
    });
    let check = Check {
        probe,
        interval: Duration::from_millis(interval_ms),
        timeout: Duration::from_millis(timeout_ms),
        rise: count(&raw.rise, 2, errors),
        fall: count(&raw.fall, 3, errors),
        resets_per_second: resets,
    };
    (check.probe.is_some() || check.resets_per_second.is_some()).then_some(check)
}

/// Reports fields that only another kind of check has.
fn foreign_fields(raw: &raw::Check, kind: Kind, errors: &mut Collector) {
    let text = |field: &raw::Text| field.as_ref().map(|field| (field.at.clone(), field.path.clone()));
    let status = raw.http_status.as_ref().map(|field| (field.at.clone(), field.path.clone()));
    for (belongs, label, field) in [
        (Kind::Http, "http", text(&raw.http_path)),
        (Kind::Http, "http", text(&raw.http_host)),
        (Kind::Http, "http", status),
        (Kind::Udp, "udp", text(&raw.send)),
        (Kind::Udp, "udp", text(&raw.send_hex)),
        (Kind::Udp, "udp", text(&raw.expect)),
        (Kind::Udp, "udp", text(&raw.expect_hex)),
    ] {
        if let Some((at, path)) = field
            && belongs != kind
        {
            errors.push(&at, path, format!("means something only with type = \"{label}\""));
        }
    }
}

fn http(raw: &raw::Check, errors: &mut Collector) -> Probe {
    let path = match &raw.http_path {
        None => "/".to_owned(),
        Some(field) => {
            let fits = field.value.starts_with('/') && field.value.parse::<http::uri::PathAndQuery>().is_ok();
            if !fits {
                let message = format!("{:?} is not a path such as \"/healthz\"", field.value);
                errors.push(&field.at, &field.path, message);
            }
            field.value.clone()
        }
    };
    let host = raw.http_host.as_ref().map(|field| {
        if http::HeaderValue::from_str(&field.value).is_err() || field.value.is_empty() {
            errors.push(&field.at, &field.path, format!("{:?} cannot be a Host header", field.value));
        }
        field.value.clone()
    });
    let status = match &raw.http_status {
        None => 200..=399,
        Some(field) => status(&field.value).unwrap_or_else(|| {
            let message = "write a status code, such as 200, or a range of them, such as \"200-299\"";
            errors.push(&field.at, &field.path, message);
            200..=399
        }),
    };
    Probe::Http { path, host, status }
}

fn status(value: &toml::Value) -> Option<RangeInclusive<u16>> {
    let code = |text: &str| text.trim().parse::<u16>().ok().filter(|code| (100..=599).contains(code));
    let range = match value {
        toml::Value::Integer(one) => {
            let one = code(&one.to_string())?;
            one..=one
        }
        toml::Value::String(text) => match text.split_once('-') {
            Some((from, to)) => code(from)?..=code(to)?,
            None => code(text)?..=code(text)?,
        },
        _ => return None,
    };
    (!range.is_empty()).then_some(range)
}

fn udp(raw: &raw::Check, errors: &mut Collector) -> Option<Probe> {
    let send = bytes(&raw.send, &raw.send_hex, errors)?;
    let expect = bytes(&raw.expect, &raw.expect_hex, errors)?;
    Some(Probe::Udp { send, expect })
}

/// Bytes as text or in hexadecimal; none where neither is given, `None` where something is wrong.
fn bytes(text: &raw::Text, hex: &raw::Text, errors: &mut Collector) -> Option<Vec<u8>> {
    let (field, bytes) = match (text, hex) {
        (None, None) => return Some(Vec::new()),
        (Some(text), None) => (text, Ok(text.value.clone().into_bytes())),
        (None, Some(hex)) => (hex, from_hex(hex)),
        (Some(text), Some(hex)) => (hex, Err(format!("stands beside {}: give one of them", text.path))),
    };
    let bytes = bytes.and_then(|bytes| match bytes.len() {
        0..=DATAGRAM_MOST => Ok(bytes),
        length => Err(format!("{length} bytes are more than a datagram takes: at most {DATAGRAM_MOST}")),
    });
    bytes.map_err(|message| errors.push(&field.at, &field.path, message)).ok()
}

fn from_hex(field: &Field<String>) -> Result<Vec<u8>, String> {
    let wrong = || format!("{:?} is not hexadecimal, such as \"ffff 0a\"", field.value);
    let digits: Vec<u8> = field
        .value
        .chars()
        .filter(|c| !c.is_whitespace())
        .map(|c| c.to_digit(16).and_then(|digit| u8::try_from(digit).ok()).ok_or_else(wrong))
        .collect::<Result<_, _>>()?;
    if !digits.len().is_multiple_of(2) {
        return Err(wrong());
    }
    Ok(digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect())
}
