//! What the coordinator and the agents ask of the system around their process: tasks, connections, the time of day.
//!
//! A simulation has many such processes in one. What runs [`inside`] of one of them gets these from that one, and so does
//! whatever it starts; everything else gets them from the system. (Tokio's own clock is used for all that waits.)

use std::io;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use futures_util::future::BoxFuture;
use hyper::rt::Executor;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::task::{AbortHandle, JoinHandle};

/// A process of a simulation.
pub trait Process: Send + Sync {
    /// A task was started in it, which is to end with it.
    fn own(&self, task: AbortHandle);
    /// Opens a connection.
    fn connect(&self, authority: &str) -> BoxFuture<'static, io::Result<Box<dyn Stream>>>;
    /// What its clock says, in microseconds since the Unix epoch.
    fn now_unix_us(&self) -> i64;
}

/// A connection of a simulation.
pub trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

tokio::task_local! {
    static PROCESS: Arc<dyn Process>;
}

fn current() -> Option<Arc<dyn Process>> {
    PROCESS.try_with(Arc::clone).ok()
}

/// Runs something as a part of a process of a simulation.
pub fn inside<T>(process: Arc<dyn Process>, work: impl Future<Output = T>) -> impl Future<Output = T> {
    PROCESS.scope(process, work)
}

/// Starts a task.
pub fn spawn<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
    let Some(process) = current() else { return tokio::spawn(work) };
    let task = tokio::spawn(inside(process.clone(), work));
    process.own(task.abort_handle());
    task
}

/// For a task that is started in another way, and ends with the one that starts it.
pub fn inherit<T>(work: impl Future<Output = T>) -> impl Future<Output = T> {
    let process = current();
    async move {
        match process {
            Some(process) => inside(process, work).await,
            None => work.await,
        }
    }
}

/// Starts tasks for hyper.
#[derive(Clone, Copy, Debug)]
pub struct Spawner;

impl<F> Executor<F> for Spawner
where
    F: Future<Output: Send + 'static> + Send + 'static,
{
    fn execute(&self, work: F) {
        spawn(work);
    }
}

/// A connection.
pub enum Connection {
    /// Over the network.
    Tcp(TcpStream),
    /// Within a simulation.
    Simulated(Box<dyn Stream>),
}

/// Opens a connection to `HOST:PORT` on which small messages do not wait for more.
pub async fn connect(authority: &str) -> io::Result<Connection> {
    if let Some(process) = current() {
        return process.connect(authority).await.map(Connection::Simulated);
    }
    let stream = TcpStream::connect(authority).await?;
    stream.set_nodelay(true)?;
    Ok(Connection::Tcp(stream))
}

/// `CLOCK_REALTIME` in microseconds.
pub fn now_unix_us() -> i64 {
    if let Some(process) = current() {
        return process.now_unix_us();
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| i64::try_from(now.as_micros()).unwrap_or(i64::MAX))
}
