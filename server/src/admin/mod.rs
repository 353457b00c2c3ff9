//! The admin listener: /live, /ready, /metrics, /status, /streams. Runs on the control thread; asks the control loop for views.

mod families;
mod metrics;
mod process;
pub(crate) mod status;
mod streams;
pub(crate) mod view;

pub(crate) use families::metrics_page;

use crate::exit::Fatal;
use crate::settings::address::AdminAddress;
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use shard::listing::{Inquiry, Page};
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use view::View;

/// Questions waiting for the control loop.
pub(crate) const QUESTIONS_MAX: usize = 64;
/// Admin connections at a time: a handful of scrapers and probes; the rest waits in the backlog.
const CONNECTIONS_MAX: usize = 64;

/// How long a shard may take to tell of some of its streams. Whoever asks waits; nobody is alarmed by it.
const SHARD_LIMIT: Duration = Duration::from_secs(5);

/// A question to the control loop.
pub(crate) enum Question {
    View {
        /// Ask the shards, too; without it the answer comes at once and has no shards.
        ask_shards: bool,
        answer: oneshot::Sender<Arc<View>>,
    },
    /// Some streams of one shard.
    Streams {
        shard: usize,
        inquiry: Inquiry,
        /// Dropped where no answer can come.
        answer: oneshot::Sender<Page>,
    },
}

/// A bound admin listener; a unix socket's file is removed on drop.
pub(crate) struct Bound {
    listener: Listener,
    /// As bound, for the banner.
    pub(crate) address: String,
    _file: Option<SocketFile>,
}

enum Listener {
    Tcp(std::net::TcpListener),
    Unix(std::os::unix::net::UnixListener),
}

struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.0) {
            log::warn!("cannot remove {}: {error}", self.0.display());
        }
    }
}

/// Binds the admin address; `None` when it is off.
pub(crate) fn bind(address: &AdminAddress) -> Result<Option<Bound>, Fatal> {
    let fatal = |error: std::io::Error| {
        Fatal::unavailable(format!(
            "cannot bind the admin address {address}: {error} (--admin takes another, or off)"
        ))
    };
    match address {
        AdminAddress::Off => Ok(None),
        AdminAddress::Tcp(socket_address) => {
            let listener = std::net::TcpListener::bind(socket_address).map_err(fatal)?;
            listener.set_nonblocking(true).map_err(fatal)?;
            let address = format!("http://{}", listener.local_addr().map_err(fatal)?);
            Ok(Some(Bound { listener: Listener::Tcp(listener), address, _file: None }))
        }
        AdminAddress::Unix(path) => {
            remove_stale(path).map_err(fatal)?;
            let listener = std::os::unix::net::UnixListener::bind(path).map_err(fatal)?;
            listener.set_nonblocking(true).map_err(fatal)?;
            let file = Some(SocketFile(path.clone()));
            Ok(Some(Bound { listener: Listener::Unix(listener), address: address.to_string(), _file: file }))
        }
    }
}

/// Removes the socket a killed process left behind: one that nobody answers on.
fn remove_stale(path: &std::path::Path) -> std::io::Result<()> {
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if metadata.file_type().is_socket() => {
            match std::os::unix::net::UnixStream::connect(path) {
                Ok(_) => Err(std::io::ErrorKind::AddrInUse.into()),
                Err(_) => std::fs::remove_file(path),
            }
        }
        // Anything else is not ours to remove; bind complains of it.
        _ => Ok(()),
    }
}

impl Bound {
    /// Serves until the runtime ends.
    pub(crate) fn serve(&self, questions: mpsc::Sender<Question>) -> Result<(), Fatal> {
        let fatal = |error: std::io::Error| Fatal::internal(format!("the admin listener: {error}"));
        let router = router(questions);
        let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        match &self.listener {
            Listener::Tcp(listener) => {
                let listener =
                    listener.try_clone().and_then(tokio::net::TcpListener::from_std).map_err(fatal)?;
                tokio::spawn(axum::serve(Limited { listener, permits }, router).into_future());
            }
            Listener::Unix(listener) => {
                let listener =
                    listener.try_clone().and_then(tokio::net::UnixListener::from_std).map_err(fatal)?;
                tokio::spawn(axum::serve(Limited { listener, permits }, router).into_future());
            }
        }
        Ok(())
    }
}

/// A listener that takes at most [`CONNECTIONS_MAX`] connections at a time.
struct Limited<L> {
    listener: L,
    permits: Arc<Semaphore>,
}

impl<L: axum::serve::Listener> axum::serve::Listener for Limited<L> {
    type Io = Permitted<L::Io>;
    type Addr = L::Addr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        let permit = Arc::clone(&self.permits).acquire_owned().await;
        let permit = permit.unwrap_or_else(|_| unreachable!("the semaphore is never closed"));
        let (io, address) = self.listener.accept().await;
        (Permitted { io, _permit: permit }, address)
    }

    fn local_addr(&self) -> std::io::Result<Self::Addr> {
        self.listener.local_addr()
    }
}

/// A connection that gives its permit back when it is closed.
struct Permitted<I> {
    io: I,
    _permit: OwnedSemaphorePermit,
}

mod permitted_io {
    //! Passes everything through.
    use super::Permitted;
    use std::io;
    use std::pin::Pin;
    use std::task::{Context, Poll};
    use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

    impl<I: AsyncRead + Unpin> AsyncRead for Permitted<I> {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            Pin::new(&mut self.io).poll_read(cx, buf)
        }
    }

    impl<I: AsyncWrite + Unpin> AsyncWrite for Permitted<I> {
        fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
            Pin::new(&mut self.io).poll_write(cx, buf)
        }
        fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.io).poll_flush(cx)
        }
        fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.io).poll_shutdown(cx)
        }
    }
}

#[derive(Clone)]
struct Control(mpsc::Sender<Question>);

impl Control {
    /// `None` when the control loop has ended.
    async fn view(&self, ask_shards: bool) -> Option<Arc<View>> {
        let (answer, wait) = oneshot::channel();
        self.0.send(Question::View { ask_shards, answer }).await.ok()?;
        wait.await.ok()
    }

    /// `None` when the shard is gone, or does not answer in time.
    async fn streams(&self, shard: usize, inquiry: Inquiry) -> Option<Page> {
        let (answer, wait) = oneshot::channel();
        self.0.send(Question::Streams { shard, inquiry, answer }).await.ok()?;
        tokio::time::timeout(SHARD_LIMIT, wait).await.ok()?.ok()
    }
}

fn router(questions: mpsc::Sender<Question>) -> Router {
    Router::new()
        .route("/", get(index))
        .route("/live", get(|| async { "live\n" }))
        .route("/ready", get(ready))
        .route("/metrics", get(metrics_handler))
        .route("/status", get(status_handler))
        .route("/streams", get(streams::list))
        .route("/streams/{*which}", get(streams::show))
        .with_state(Control(questions))
}

async fn index() -> &'static str {
    concat!(
        "tokenring ",
        env!("CARGO_PKG_VERSION"),
        "\n\n/live     200 while the process runs\n/ready    200 while clients should be sent here, else 503 and why\n",
        "/metrics  Prometheus\n/status   shards, streams, upstreams, slowest connections (JSON)\n",
        "/streams  streams that can be read by id, and durable ones (JSON)\n"
    )
}

async fn ready(State(control): State<Control>) -> Response {
    // Draining and missing upstreams are known without asking the shards, and answered at once.
    let Some(view) = control.view(false).await else { return gone() };
    let mut unready = view.unready();
    if unready.is_none() {
        let Some(view) = control.view(true).await else { return gone() };
        unready = view.unready();
    }
    match unready {
        None => json(StatusCode::OK, &serde_json::json!({ "ready": true })),
        Some((reason, message)) => {
            let body = serde_json::json!({ "ready": false, "reason": reason, "message": message });
            json(StatusCode::SERVICE_UNAVAILABLE, &body)
        }
    }
}

async fn metrics_handler(State(control): State<Control>) -> Response {
    let Some(view) = control.view(true).await else { return gone() };
    let page = metrics::page(&view, &process::Process::read());
    ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], page).into_response()
}

async fn status_handler(State(control): State<Control>) -> Response {
    let Some(view) = control.view(true).await else { return gone() };
    json(StatusCode::OK, &status::page(&view, crate::clock::since_1970().as_secs()))
}

fn gone() -> Response {
    json(StatusCode::SERVICE_UNAVAILABLE, &serde_json::json!({ "ready": false, "reason": "stopping" }))
}

fn json(status: StatusCode, value: &serde_json::Value) -> Response {
    (status, [(header::CONTENT_TYPE, "application/json")], format!("{value:#}\n")).into_response()
}
