//! The source's end of a stream of pages: reads questions, answers them from the stopped tasks' memory.

use std::collections::BTreeMap;
use std::io;

use bytes::{Bytes, BytesMut};
use futures_util::{Stream, StreamExt};

use super::read::read_memory;
use super::wire::{Question, WireError};

/// Why questions could not be answered.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// What came.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The connection.
    #[error("the connection from the target broke: {0}")]
    Stream(String),
    /// A task that is not here.
    #[error("there is no task {0} here")]
    Task(i32),
    /// Its memory.
    #[error("the memory of task {pid} at {address:#x} cannot be read")]
    Memory {
        /// As the workload counts.
        pid: i32,
        /// Where.
        address: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Answers what comes in `questions`; `tasks` has the host's pids by the workload's own. `done` is called when the target
/// says that it has everything.
pub fn answers<E: std::fmt::Display>(
    questions: impl Stream<Item = Result<Bytes, E>> + Unpin + Send + 'static,
    tasks: BTreeMap<i32, i32>,
    done: impl FnOnce() + Send + 'static,
) -> impl Stream<Item = Result<Bytes, ServeError>> + Send + 'static {
    let state = Serving { questions, tasks, done: Some(done), buffer: BytesMut::new(), is_over: false };
    futures_util::stream::unfold(state, |mut state| async {
        let answer = state.next().await?;
        state.is_over |= answer.is_err();
        Some((answer, state))
    })
}

struct Serving<S, D> {
    questions: S,
    tasks: BTreeMap<i32, i32>,
    done: Option<D>,
    buffer: BytesMut,
    is_over: bool,
}

impl<E: std::fmt::Display, S: Stream<Item = Result<Bytes, E>> + Unpin, D: FnOnce()> Serving<S, D> {
    async fn next(&mut self) -> Option<Result<Bytes, ServeError>> {
        while !self.is_over {
            match Question::take(&mut self.buffer) {
                Ok(Some(question)) => return Some(self.answer(question)),
                Ok(None) => {}
                Err(error) => return Some(Err(error.into())),
            }
            match self.questions.next().await? {
                Ok(data) => self.buffer.extend_from_slice(&data),
                Err(error) => return Some(Err(ServeError::Stream(error.to_string()))),
            }
        }
        None
    }

    fn answer(&mut self, question: Question) -> Result<Bytes, ServeError> {
        let mut answer = BytesMut::with_capacity(super::wire::QUESTION_BYTES + question.bytes());
        question.put(&mut answer);
        if question == Question::DONE {
            self.is_over = true;
            if let Some(done) = self.done.take() {
                done();
            }
            return Ok(answer.freeze());
        }
        let pid = *self.tasks.get(&question.pid).ok_or(ServeError::Task(question.pid))?;
        let start = answer.len();
        answer.resize(start + question.bytes(), 0);
        let mut filled = start;
        while filled < answer.len() {
            let address = question.address + (filled - start) as u64;
            let failed = |source| ServeError::Memory { pid: question.pid, address, source };
            match read_memory(pid, address, &mut answer[filled..]) {
                Ok(0) => return Err(failed(io::ErrorKind::UnexpectedEof.into())),
                Ok(read) => filled += read,
                Err(error) => return Err(failed(error)),
            }
        }
        Ok(answer.freeze())
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::criu::images::PAGE_BYTES;
    use crate::memory::wire::Answers;

    async fn ask(questions: &[Question], done: Arc<AtomicBool>) -> Vec<Result<Bytes, ServeError>> {
        let mut buffer = BytesMut::new();
        questions.iter().for_each(|question| question.put(&mut buffer));
        let chunks: Vec<_> =
            buffer.chunks(7).map(|chunk| Ok::<_, Infallible>(Bytes::copy_from_slice(chunk))).collect();
        let tasks = BTreeMap::from([(5000, i32::try_from(std::process::id()).unwrap())]);
        let told = move || done.store(true, Ordering::Relaxed);
        answers(futures_util::stream::iter(chunks), tasks, told).collect().await
    }

    #[tokio::test]
    async fn memory_is_read_and_the_end_is_told() {
        let memory = vec![7_u8; 3 * PAGE_BYTES as usize];
        let address = (memory.as_ptr() as u64).next_multiple_of(PAGE_BYTES);
        let question = Question { pid: 5000, address, pages: 2 };
        let done = Arc::new(AtomicBool::new(false));
        let came = ask(&[question, Question::DONE], done.clone()).await;
        let mut answers = Answers::default();
        came.into_iter().for_each(|answer| answers.push(&answer.unwrap()));
        let (head, content) = answers.take().unwrap().unwrap();
        assert_eq!((head, content.len()), (question, 8192));
        assert!(content.iter().all(|byte| *byte == 7));
        assert_eq!(answers.take().unwrap(), Some((Question::DONE, Bytes::new())));
        assert!(done.load(Ordering::Relaxed));
    }

    #[tokio::test]
    async fn what_is_not_there_ends_the_stream() {
        let done = Arc::new(AtomicBool::new(false));
        for (question, text) in [
            (Question { pid: 4, address: 0, pages: 1 }, "no task 4"),
            (Question { pid: 5000, address: 0, pages: 1 }, "cannot be read"),
        ] {
            let came = ask(&[question, Question::DONE], done.clone()).await;
            assert_eq!(came.len(), 1);
            assert!(came[0].as_ref().unwrap_err().to_string().contains(text), "{came:?}");
        }
        assert!(!done.load(Ordering::Relaxed));
    }
}
