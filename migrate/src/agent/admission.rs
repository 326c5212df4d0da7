//! Which caller may ask an agent for what.
//!
//! All that an agent can be asked for is a coordinator's, whatever is added to it. The exceptions are here.

use std::sync::Arc;

use axum::Extension;
use axum::extract::{MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::{Method, StatusCode};

use super::door::Caller;
use super::refusal::Refusal;
use super::server::known_as;
use super::site::Site;
use crate::protocol::Role;
use crate::tls::Identity;

/// Whether an agent is up: for every caller.
pub(super) const HEALTH: &str = "/healthz";
/// Where a target hears what the workload needs: for the agent of the migration's source.
pub(super) const MANIFEST: &str = "/v1/migrations/{id}/manifest";
/// Where a source gives memory that did not come with the images: for the agent of the migration's target.
pub(super) const MEMORY: &str = "/v1/migrations/{id}/memory";
/// Where a target takes images: for the agent of the migration's source.
pub(super) const IMAGES: &str = "/v1/migrations/{id}/images";

/// Lets a request pass, or refuses it before its handler sees it.
pub(super) async fn admit(
    State(site): State<Arc<Site>>,
    Extension(caller): Extension<Caller>,
    request: Request,
    next: Next,
) -> Response {
    match check(&site, &caller, &request) {
        Ok(()) => next.run(request).await,
        Err(refusal) => {
            let (method, path) = (request.method(), request.uri().path());
            tracing::warn!(?caller, %method, path, "refused: {}", refusal.detail);
            refusal.into_response()
        }
    }
}

fn check(site: &Site, caller: &Caller, request: &Request) -> Result<(), Refusal> {
    let route = request.extensions().get::<MatchedPath>().map(MatchedPath::as_str);
    match may(caller, request.method(), route) {
        May::Pass => Ok(()),
        May::SendFrom(sender) => {
            let id = id_of(request);
            let session = known_as(site, id, Role::Target)?;
            if session.peer.get().is_some_and(|peer| peer.site == sender) {
                return Ok(());
            }
            let detail = format!("migration {id:?} takes nothing from the agent of site {sender:?}");
            Err(Refusal::new(StatusCode::FORBIDDEN, detail))
        }
        May::FetchFor(target) => {
            let id = id_of(request);
            if site.debt(id).is_some_and(|(_, debt)| debt.to == target) {
                return Ok(());
            }
            let detail = format!("migration {id:?} owes nothing to the agent of site {target:?}");
            Err(Refusal::new(StatusCode::FORBIDDEN, detail))
        }
        May::Not(agent) => Err(Refusal::new(
            StatusCode::FORBIDDEN,
            format!(
                "this is for coordinators, and the certificate is that of the agent of site {agent:?}, which may only \
                 send a manifest and images to a migration's target, and fetch memory from its source"
            ),
        )),
    }
}

fn id_of(request: &Request) -> &str {
    let rest = request.uri().path().strip_prefix("/v1/migrations/").and_then(|rest| rest.split_once('/'));
    rest.map_or("", |(id, _)| id)
}

/// What a caller may do, by the route.
#[derive(Debug, PartialEq, Eq)]
enum May<'a> {
    Pass,
    /// If the migration expects it from this site.
    SendFrom(&'a str),
    /// If the migration goes to this site.
    FetchFor(&'a str),
    /// Since it is this site's agent.
    Not(&'a str),
}

fn may<'a>(caller: &'a Caller, method: &Method, route: Option<&str>) -> May<'a> {
    match caller {
        Caller::Anyone | Caller::Known(Identity::Coordinator(_)) => May::Pass,
        Caller::Known(Identity::Agent(site)) => match route {
            Some(HEALTH) => May::Pass,
            Some(IMAGES | MANIFEST) if method == Method::POST => May::SendFrom(site),
            Some(MEMORY) if method == Method::POST => May::FetchFor(site),
            _ => May::Not(site),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_sends_what_it_has_and_commands_nothing() {
        let agent = Caller::Known(Identity::Agent("ams".into()));
        for (method, route, expected) in [
            (Method::GET, Some(HEALTH), May::Pass),
            (Method::POST, Some(IMAGES), May::SendFrom("ams")),
            (Method::POST, Some(MANIFEST), May::SendFrom("ams")),
            (Method::POST, Some(MEMORY), May::FetchFor("ams")),
            (Method::GET, Some(IMAGES), May::Not("ams")),
            (Method::GET, Some("/v1/workloads"), May::Not("ams")),
            (Method::POST, Some("/v1/workloads/{name}/stop"), May::Not("ams")),
            (Method::PUT, Some("/v1/migrations/{id}"), May::Not("ams")),
            (Method::GET, Some("/v1/migrations/{id}/events"), May::Not("ams")),
            (Method::POST, Some("/v1/migrations/{id}/whatever-comes-next"), May::Not("ams")),
            (Method::GET, None, May::Not("ams")),
        ] {
            assert_eq!(may(&agent, &method, route), expected, "{method} {route:?}");
            for other in [Caller::Anyone, Caller::Known(Identity::Coordinator("lb".into()))] {
                assert_eq!(may(&other, &method, route), May::Pass, "{method} {route:?}");
            }
        }
    }
}
