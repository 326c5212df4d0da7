//! The configuration as the file says it: right types, no meaning checked yet.

use toml::de::DeTable;

use super::error::Collector;
use super::read::{Field, Reader};

pub(super) type Text = Option<Field<String>>;
pub(super) type Number = Option<Field<i64>>;

/// The whole file. What is absent, or was reported as unreadable, is `None`.
pub(super) struct Raw {
    pub(super) admin: Admin,
    pub(super) datapath: Datapath,
    pub(super) hold: Hold,
    pub(super) sites: Vec<Site>,
    pub(super) backends: Vec<Backend>,
    pub(super) services: Vec<Service>,
}

#[derive(Default)]
pub(super) struct Admin {
    pub(super) listen: Text,
    pub(super) allow_remote: Option<Field<bool>>,
}

#[derive(Default)]
pub(super) struct Datapath {
    pub(super) interfaces: Option<Field<Vec<String>>>,
    pub(super) pin_path: Text,
    pub(super) nat_source4: Text,
    pub(super) nat_source6: Text,
}

#[derive(Default)]
pub(super) struct Hold {
    pub(super) max_bytes: Option<Field<toml::Value>>,
    pub(super) max_age_ms: Number,
    pub(super) deadline_ms: Number,
    pub(super) overflow: Text,
}

pub(super) struct Site {
    pub(super) name: Text,
    pub(super) next_hop: Text,
    pub(super) agent: Text,
}

pub(super) struct Backend {
    pub(super) name: Text,
    pub(super) address: Text,
    pub(super) site: Text,
    pub(super) weight: Number,
}

pub(super) struct Service {
    pub(super) name: Text,
    pub(super) address: Text,
    pub(super) protocol: Text,
    pub(super) backends: Option<Field<Vec<String>>>,
}

/// Reads the file's tables. `None` when the text is not TOML; the errors then say where.
pub(super) fn read(text: &str, errors: &mut Collector<'_>) -> Option<Raw> {
    let (document, syntax) = DeTable::parse_recoverable(text);
    for error in &syntax {
        errors.push(&error.span().unwrap_or(0..0), "", error.message().trim_end());
    }
    if !syntax.is_empty() {
        return None;
    }
    let at = document.span();
    let mut top = Reader::new(String::new(), at.start..at.start, document.into_inner());
    let raw = Raw {
        admin: top.table("admin", errors).map(|t| admin(t, errors)).unwrap_or_default(),
        datapath: match top.table("datapath", errors) {
            Some(table) => datapath(table, errors),
            None => {
                errors.push(
                    &top.at,
                    "datapath.interfaces",
                    "is missing: name the interfaces that carry packets",
                );
                Datapath::default()
            }
        },
        hold: top.table("hold", errors).map(|t| hold(t, errors)).unwrap_or_default(),
        sites: top.tables("sites", errors).into_iter().map(|t| site(t, errors)).collect(),
        backends: top.tables("backends", errors).into_iter().map(|t| backend(t, errors)).collect(),
        services: top.tables("services", errors).into_iter().map(|t| service(t, errors)).collect(),
    };
    for (name, found) in [
        ("sites", !raw.sites.is_empty()),
        ("backends", !raw.backends.is_empty()),
        ("services", !raw.services.is_empty()),
    ] {
        if !found {
            errors.push(&top.at, name, format!("is missing or empty: at least one [[{name}]] is needed"));
        }
    }
    top.finish(errors);
    Some(raw)
}

fn admin(mut table: Reader<'_>, errors: &mut Collector<'_>) -> Admin {
    let admin = Admin {
        listen: table.optional("listen", errors),
        allow_remote: table.optional("allow_remote", errors),
    };
    table.finish(errors);
    admin
}

fn datapath(mut table: Reader<'_>, errors: &mut Collector<'_>) -> Datapath {
    let datapath = Datapath {
        interfaces: table.required("interfaces", errors),
        pin_path: table.optional("pin_path", errors),
        nat_source4: table.optional("nat_source4", errors),
        nat_source6: table.optional("nat_source6", errors),
    };
    table.finish(errors);
    datapath
}

fn hold(mut table: Reader<'_>, errors: &mut Collector<'_>) -> Hold {
    let hold = Hold {
        max_bytes: table.optional("max_bytes", errors),
        max_age_ms: table.optional("max_age_ms", errors),
        deadline_ms: table.optional("deadline_ms", errors),
        overflow: table.optional("overflow", errors),
    };
    table.finish(errors);
    hold
}

fn site(mut table: Reader<'_>, errors: &mut Collector<'_>) -> Site {
    let site = Site {
        name: table.required("name", errors),
        next_hop: table.required("next_hop", errors),
        agent: table.optional("agent", errors),
    };
    table.finish(errors);
    site
}

fn backend(mut table: Reader<'_>, errors: &mut Collector<'_>) -> Backend {
    let backend = Backend {
        name: table.required("name", errors),
        address: table.required("address", errors),
        site: table.required("site", errors),
        weight: table.optional("weight", errors),
    };
    table.finish(errors);
    backend
}

fn service(mut table: Reader<'_>, errors: &mut Collector<'_>) -> Service {
    let service = Service {
        name: table.required("name", errors),
        address: table.required("address", errors),
        protocol: table.required("protocol", errors),
        backends: table.required("backends", errors),
    };
    table.finish(errors);
    service
}
