//! The main server's compute thread: the keeper, one piece of work after the other.
//!
//! It is separate from the coordinator, and a thread of its own, so that a slow step never keeps a ping unanswered.

use std::sync::mpsc;

use super::Error;
use super::inbox::{Done, Input, Work};
use super::keeper::{Keeper, KeeperSettings};

/// Starts the thread. It ends when the returned sender is dropped.
///
/// # Errors
/// [`Error::Thread`] when the operating system refuses.
pub fn start(settings: KeeperSettings, replies: tokio::sync::mpsc::Sender<Input>) -> Result<mpsc::Sender<Work>, Error> {
    let (sender, work) = mpsc::channel();
    let answer = move |done| replies.blocking_send(Input::Computed(done)).is_ok();
    std::thread::Builder::new()
        .name("main server".to_owned())
        .spawn(move || {
            if let Err(error) = pollster::block_on(run(settings, &work, &answer)) {
                answer(Done::Failed(error));
            }
        })
        .map_err(Error::Thread)?;
    Ok(sender)
}

async fn run(
    settings: KeeperSettings,
    work: &mpsc::Receiver<Work>,
    answer: &impl Fn(Done) -> bool,
) -> Result<(), Error> {
    let (mut keeper, mut done) = Keeper::load(settings)?;
    loop {
        if done.is_some_and(|done| !answer(done)) {
            return Ok(());
        }
        let Ok(work) = work.recv() else { return Ok(()) };
        (keeper, done) = keeper.handle(work).await?;
    }
}
