//! The connection requests come in on, made so that it can be drained without losing one.
//!
//! async-nats 0.51 forgets a subscription as soon as it has *sent* the UNSUB, so a request that was on its
//! way then is dropped, and nobody else gets it. Here the connection lives on a thread of its own, on a
//! runtime that moves only while it is driven. To drain, the thread sends the UNSUBs, stands still until the
//! server has acted on them and everything it had sent lies in the socket, and then reads all of it in one go,
//! before the library gets to forget anything.

use std::sync::mpsc as blocking;
use std::thread;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::{Connection, Fatal, NatsSettings, connect};

/// Longer than an UNSUB takes to the server and the last requests take back.
const STANDSTILL: Duration = Duration::from_millis(250);

/// A connection for requests, driven by its own thread.
pub(crate) struct Requests {
    pub connection: Connection,
    pause: oneshot::Sender<()>,
    paused: oneshot::Receiver<()>,
    queued: blocking::Sender<()>,
    ended: oneshot::Sender<()>,
}

/// The connection stands still; the drains may be queued.
pub(crate) struct Paused {
    queued: blocking::Sender<()>,
    ended: oneshot::Sender<()>,
}

/// The drains are under way.
pub(crate) struct Draining {
    _ended: oneshot::Sender<()>,
}

impl Requests {
    /// Connects, waiting for the servers like [`connect`].
    ///
    /// # Errors
    /// As [`connect`].
    pub(crate) async fn connect(settings: &NatsSettings, name: &str, stop: &CancellationToken) -> Result<Requests, Fatal> {
        let (settings, name, stop) = (settings.clone(), format!("{name} (requests)"), stop.clone());
        let (connected_tx, connected) = oneshot::channel();
        let (pause, pause_rx) = oneshot::channel();
        let (paused_tx, paused) = oneshot::channel();
        let (queued, queued_rx) = blocking::channel();
        let (ended, ended_rx) = oneshot::channel();
        let line = move || {
            let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime,
                Err(error) => {
                    let _ = connected_tx.send(Err(Fatal::new(format!("no tokio runtime: {error}"))));
                    return;
                }
            };
            let client = match runtime.block_on(connect(&settings, &name, &stop)) {
                Ok(connection) => {
                    let client = connection.client().clone();
                    if connected_tx.send(Ok(connection)).is_err() {
                        return;
                    }
                    client
                }
                Err(fatal) => {
                    let _ = connected_tx.send(Err(fatal));
                    return;
                }
            };
            // Every one of these fails only when the function is gone already.
            let _ = runtime.block_on(pause_rx);
            let _ = paused_tx.send(());
            let _ = queued_rx.recv();
            let _ = runtime.block_on(client.flush());
            thread::sleep(STANDSTILL);
            let _ = runtime.block_on(ended_rx);
        };
        thread::Builder::new().name("requests".to_owned()).spawn(line).map_err(|error| Fatal::new(format!("no thread: {error}")))?;
        let connection = connected.await.map_err(|_| Fatal::new("the thread for requests ended at once"))??;
        Ok(Requests { connection, pause, paused, queued, ended })
    }

    /// Stands still. Whoever has a subscription now queues its drain.
    pub(crate) async fn pause(self) -> Paused {
        let _ = self.pause.send(());
        let _ = self.paused.await;
        Paused { queued: self.queued, ended: self.ended }
    }
}

impl Paused {
    /// Every drain is queued: sends the UNSUBs and delivers what still comes. The connection ends when the
    /// result is dropped.
    pub(crate) fn drain(self) -> Draining {
        let _ = self.queued.send(());
        Draining { _ended: self.ended }
    }
}
