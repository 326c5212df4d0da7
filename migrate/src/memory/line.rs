//! The target's end of a stream of pages: questions go out, answers come in.

use std::convert::Infallible;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use http::Method;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use tokio::sync::mpsc;

use super::wire::{Answers, Question};
use crate::client::{AgentClient, chain};

/// What a line brings.
#[derive(Debug)]
pub enum Brought {
    /// Pages.
    Answer(Question, Bytes),
    /// It broke off, for this reason; nothing more comes.
    Broken(String),
}

/// An open stream.
#[derive(Debug)]
pub struct Line {
    questions: mpsc::UnboundedSender<Bytes>,
}

impl Line {
    /// Opens it. What comes is sent to `brought` together with `mark`.
    pub fn open<M: Copy + Send + Sync + 'static>(
        client: Arc<AgentClient>,
        path: String,
        mark: M,
        brought: mpsc::UnboundedSender<(M, Brought)>,
    ) -> Self {
        let (questions, queue) = mpsc::unbounded_channel::<Bytes>();
        let frames = futures_util::stream::unfold(queue, |mut queue| async {
            let bytes = queue.recv().await?;
            Some((Ok::<_, Infallible>(Frame::data(bytes)), queue))
        });
        let body = StreamBody::new(frames.boxed()).boxed_unsync();
        tokio::spawn(async move {
            let tell = |said| drop(brought.send((mark, said)));
            let reason = match follow(&client, &path, body, |question, content| {
                tell(Brought::Answer(question, content));
            })
            .await
            {
                Ok(()) => "the source ended the stream".to_owned(),
                Err(reason) => reason,
            };
            tell(Brought::Broken(reason));
        });
        Self { questions }
    }

    /// Asks. A line that broke says so by itself.
    pub fn ask(&self, question: Question) {
        let mut buffer = BytesMut::new();
        question.put(&mut buffer);
        let _ = self.questions.send(buffer.freeze());
    }
}

async fn follow(
    client: &AgentClient,
    path: &str,
    body: crate::client::Body,
    mut each: impl FnMut(Question, Bytes) + Send,
) -> Result<(), String> {
    let response = client.send(Method::POST, path, body).await.map_err(|error| chain(&error))?;
    let mut body = client.accept(response).await.map_err(|error| chain(&error))?;
    let mut answers = Answers::default();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.map_err(|error| chain(&error))?.into_data() else { continue };
        answers.push(&data);
        while let Some((question, content)) = answers.take().map_err(|error| error.to_string())? {
            each(question, content);
        }
    }
    Ok(())
}
