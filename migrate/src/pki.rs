//! `migrate pki`: a CA, and the certificates of load balancers and agents.

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Subcommand};
use migrate::tls::Identity;
use migrate::tls::pki::{self, CA_DAYS, CERTIFICATE_DAYS, Validity};

/// What is to be made.
#[derive(Debug, Subcommand)]
pub enum Pki {
    /// Make a CA: `ca.pem`, which every host gets, and `ca.key`, which stays where it is.
    Init {
        /// The CA's folder; it is made, for its owner alone.
        #[arg(long, value_name = "DIR")]
        dir: PathBuf,
        /// What the CA is called in its certificate.
        #[arg(long, default_value = "drover")]
        name: String,
        /// For how many days it is good.
        #[arg(long, default_value_t = CA_DAYS)]
        days: u32,
    },
    /// Issue a certificate with its key to a load balancer or to a site's agent.
    Issue {
        /// The CA's folder.
        #[arg(long, value_name = "DIR")]
        dir: PathBuf,
        #[command(flatten)]
        whose: Whose,
        /// An IP address or name at which the agent is reached; may be given more than once. Without any, the agent may
        /// be anywhere: the site is what counts.
        #[arg(long, value_name = "IP_OR_DNS", conflicts_with = "coordinator")]
        address: Vec<String>,
        /// For how many days it is good.
        #[arg(long, default_value_t = CERTIFICATE_DAYS)]
        days: u32,
    },
}

/// Whose certificate it is to be.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct Whose {
    /// A load balancer's, by a name of your choice.
    #[arg(long, value_name = "NAME")]
    coordinator: Option<String>,
    /// That of a site's agent, by the site's name.
    #[arg(long, value_name = "SITE")]
    agent: Option<String>,
}

impl Pki {
    /// Makes it, and says where it is.
    pub fn run(self) -> Result<()> {
        match self {
            Self::Init { dir, name, days } => {
                let ca = pki::init(&dir, &name, Validity::days(days)?)?;
                println!(
                    "{} is the CA's certificate, for every host; its key stays in {}",
                    ca.display(),
                    dir.display()
                );
            }
            Self::Issue { dir, whose, address, days } => {
                let identity = match (whose.coordinator, whose.agent) {
                    (Some(name), _) => Identity::Coordinator(name),
                    (None, Some(site)) => Identity::Agent(site),
                    (None, None) => unreachable!("clap asks for one of them"),
                };
                let files = pki::issue(&dir, &identity, &address, Validity::days(days)?)?;
                println!(
                    "for {identity}, whose host gets these three files (the key for root alone):\n[tls]"
                );
                for (key, path) in files.each() {
                    println!("{key} = {path:?}");
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(subcommand)]
        pki: Pki,
    }

    #[test]
    fn a_certificate_is_for_one_and_addresses_are_agents() {
        let parse = |line: &str| Cli::try_parse_from(line.split(' ')).is_ok();
        for good in [
            "pki init --dir d --name n --days 9",
            "pki issue --dir d --coordinator lb",
            "pki issue --dir d --agent ams --address 10.2.1.1 --address ams.example --days 9",
        ] {
            assert!(parse(good), "{good}");
        }
        for bad in [
            "pki issue --dir d",
            "pki issue --dir d --coordinator lb --agent ams",
            "pki issue --dir d --coordinator lb --address 10.2.1.1",
            "pki issue --coordinator lb",
        ] {
            assert!(!parse(bad), "{bad}");
        }
    }
}
