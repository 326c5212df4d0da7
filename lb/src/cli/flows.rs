//! `lb flows`.

use std::io::Write as _;

use clap::{Args, ValueEnum};
use http::Method;

use super::text::{milliseconds, table};
use super::{AdminArgs, ClientError};
use crate::admin::{FlowView, FlowsView};
use crate::client::{AdminClient, query};

#[derive(Debug, Args)]
pub(super) struct FlowsArgs {
    #[command(flatten)]
    admin: AdminArgs,
    /// Only flows of this client or network of clients, such as 198.51.100.0/24.
    #[arg(long, value_name = "PREFIX")]
    client: Option<String>,
    /// Only flows to this service.
    #[arg(long, value_name = "NAME")]
    service: Option<String>,
    /// Only flows of this backend.
    #[arg(long, value_name = "NAME")]
    backend: Option<String>,
    /// Only flows over this protocol.
    #[arg(long, value_enum)]
    protocol: Option<ProtocolArg>,
    /// Show so many at most.
    #[arg(long, value_name = "N", default_value_t = 1000)]
    limit: usize,
    /// Print what the API answered, as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ProtocolArg {
    Tcp,
    Udp,
}

pub(super) async fn show(args: &FlowsArgs) -> Result<(), ClientError> {
    let client = AdminClient::new(&args.admin.admin)?;
    let limit = args.limit.to_string();
    let protocol = args.protocol.map(|protocol| match protocol {
        ProtocolArg::Tcp => "tcp",
        ProtocolArg::Udp => "udp",
    });
    let path = query(
        "/v1/flows",
        &[
            ("client", args.client.as_deref()),
            ("service", args.service.as_deref()),
            ("backend", args.backend.as_deref()),
            ("protocol", protocol),
            ("limit", Some(&limit)),
        ],
    );
    let text = if args.json {
        let flows: serde_json::Value = client.json(Method::GET, &path, None::<&()>).await?;
        format!("{flows:#}\n")
    } else {
        render(&client.json(Method::GET, &path, None::<&()>).await?)
    };
    // A reader that has seen enough (`| head`) is no failure.
    let _ = std::io::stdout().write_all(text.as_bytes());
    Ok(())
}

/// The flows as a table, ordered by service, backend and client.
pub(super) fn render(answer: &FlowsView) -> String {
    let mut flows: Vec<&FlowView> = answer.flows.iter().collect();
    flows.sort_by_key(|flow| (&flow.service, &flow.backend, flow.client));
    let rows: Vec<Vec<String>> = flows.into_iter().map(row).collect();
    let headings =
        ["PROTOCOL", "CLIENT", "SERVICE", "BACKEND", "LOCATION", "SEEN AS", "MODE", "STATE", "IDLE"];
    let mut text = table(&headings, &rows);
    if answer.is_cut {
        text += &format!(
            "There are more than these {}: narrow it down (--client, --service, --backend) or raise --limit.\n",
            answer.flows.len()
        );
    }
    text
}

fn row(flow: &FlowView) -> Vec<String> {
    let service = flow.service.clone().unwrap_or_else(|| flow.service_address.to_string());
    vec![
        flow.protocol.clone(),
        flow.client.to_string(),
        service,
        flow.backend.clone().unwrap_or_else(|| "gone".to_owned()),
        flow.location.clone().unwrap_or_else(|| "unknown".to_owned()),
        flow.source.to_string(),
        flow.mode.clone(),
        flow.state.replace('_', " "),
        milliseconds(flow.idle_ms),
    ]
}
