//! Keeps web pages out: a browser on this machine can reach a loopback listener, and a page that it shows
//! must not be able to hold or move a backend.

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::{HeaderMap, StatusCode, header};

use super::problem::Problem;

/// Who may be meant by a request's `Host`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hosts {
    /// The listener is on loopback: so must the name be, or somebody bent the name service (DNS rebinding).
    Loopback,
    /// The listener is for others too, by whatever name they know it.
    Any,
}

/// Refuses what a foreign web page sent.
pub(super) async fn guard(State(hosts): State<Hosts>, request: Request, next: Next) -> Response {
    match check(request.headers(), hosts) {
        Ok(()) => next.run(request).await,
        Err(detail) => Problem::new(StatusCode::FORBIDDEN, "foreign-origin", detail).into_response(),
    }
}

fn check(headers: &HeaderMap, hosts: Hosts) -> Result<(), String> {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let host = text(header::HOST);
    if let (Hosts::Loopback, Some(host)) = (hosts, host)
        && !is_loopback(host)
    {
        return Err(format!("this API listens on loopback, and {host:?} is no name of it"));
    }
    if let Some(origin) = headers.get(header::ORIGIN) {
        let ours = host.is_some_and(|host| origin.as_bytes() == format!("http://{host}").as_bytes());
        if !ours {
            return Err(format!("a page of {origin:?} may not use this API"));
        }
    }
    Ok(())
}

fn is_loopback(host: &str) -> bool {
    let Ok(authority) = host.parse::<http::uri::Authority>() else { return false };
    let name = authority.host();
    let name = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    name.eq_ignore_ascii_case("localhost")
        || name.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(hosts: Hosts, host: Option<&str>, origin: Option<&str>) -> bool {
        let mut headers = HeaderMap::new();
        if let Some(host) = host {
            headers.insert(header::HOST, host.parse().unwrap());
        }
        if let Some(origin) = origin {
            headers.insert(header::ORIGIN, origin.parse().unwrap());
        }
        check(&headers, hosts).is_ok()
    }

    #[test]
    fn programs_on_this_machine_are_let_in() {
        for host in ["127.0.0.1:7400", "localhost:7400", "LOCALHOST", "[::1]:7400", "127.3.2.1"] {
            assert!(allowed(Hosts::Loopback, Some(host), None), "{host}");
        }
        assert!(allowed(Hosts::Loopback, None, None), "HTTP/1.0");
        assert!(
            allowed(Hosts::Loopback, Some("127.0.0.1:7400"), Some("http://127.0.0.1:7400")),
            "the dashboard"
        );
        assert!(allowed(Hosts::Any, Some("lb.example:7400"), None));
    }

    #[test]
    fn web_pages_of_others_are_kept_out() {
        assert!(!allowed(Hosts::Loopback, Some("evil.example:7400"), None), "rebound name");
        assert!(!allowed(Hosts::Loopback, Some("evil.example"), Some("http://evil.example")));
        assert!(!allowed(Hosts::Loopback, Some("127.0.0.1:7400"), Some("http://evil.example")));
        assert!(!allowed(Hosts::Loopback, Some("127.0.0.1:7400"), Some("null")));
        assert!(!allowed(Hosts::Any, Some("lb.example:7400"), Some("http://evil.example")));
        assert!(!allowed(Hosts::Any, None, Some("http://evil.example")));
    }
}
