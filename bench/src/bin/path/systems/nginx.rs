//! nginx's stream module, without logs, a worker for each of two processors.

use std::path::{Path, PathBuf};

use lab::process::Process;

use super::{find, write_config};
use crate::place::Place;

/// Its configuration.
pub const CONFIG: &str = "\
load_module MODULE;
user root;
worker_processes 2;
daemon off;
pid FOLDER/nginx.pid;
error_log stderr crit;
events { worker_connections 4096; }
stream {
  proxy_connect_timeout 5s;
  server { listen VIRTUAL:7000 reuseport backlog=4096; proxy_pass BACKEND:7000; }
  server { listen VIRTUAL:7100 reuseport backlog=4096; proxy_pass BACKEND:7100; }
  server { listen VIRTUAL:7000 udp reuseport; proxy_pass BACKEND:7000; }
}
";

/// Where Debian and others install the module.
const MODULES: [&str; 2] =
    ["/usr/lib/nginx/modules/ngx_stream_module.so", "/usr/lib64/nginx/modules/ngx_stream_module.so"];

/// The module's file, if it is installed.
pub fn module() -> Option<PathBuf> {
    MODULES.into_iter().map(PathBuf::from).find(|path| path.is_file())
}

/// Starts it in the foreground.
pub fn start(place: &Place) -> anyhow::Result<Process> {
    let dir = place.lab().dir();
    let module = module().unwrap_or(MODULES[0].into());
    let path = write_config(place, "nginx.conf", CONFIG, &[("MODULE", &module), ("FOLDER", dir)])?;
    let mut command = place.lab().lb().command(find("nginx").unwrap_or("nginx".into()));
    // The log that it opens before it has read the configuration.
    command.arg("-e").arg(Path::new("stderr")).arg("-p").arg(dir).arg("-c").arg(path);
    Ok(Process::spawn("nginx", dir, command)?)
}
