//! How pages travel after a restore: the target asks for ranges and the source answers with their content, in the order
//! in which it was asked.
//!
//! ```text
//! question = pid: i32  address: u64  pages: u32       (big endian; pid as the workload counts)
//! answer   = question  content: pages * 4096 bytes
//! ```
//!
//! The question with pid 0 says that the target has everything; it is answered with itself and ends the stream.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::criu::images::PAGE_BYTES;

/// Bytes of a question.
pub const QUESTION_BYTES: usize = 16;
/// The most that may be asked for at once.
pub const MAX_PAGES: u32 = 256;

/// Asks for pages that follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Question {
    /// Whose, as the workload counts; 0 says that everything has come.
    pub pid: i32,
    /// Of the first, as it was at the source.
    pub address: u64,
    /// How many.
    pub pages: u32,
}

/// Why a stream of pages cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Too many pages, or none.
    #[error("{0} pages at {1:#x} are asked for or answered; 1 to {MAX_PAGES} of them can be")]
    Pages(u32, u64),
    /// Not the beginning of a page.
    #[error("{0:#x} is not the address of a page")]
    Address(u64),
}

impl Question {
    /// Says that everything has come.
    pub const DONE: Self = Self { pid: 0, address: 0, pages: 0 };

    /// Bytes of the content.
    pub fn bytes(&self) -> usize {
        self.pages as usize * PAGE_BYTES as usize
    }

    /// Writes it.
    pub fn put(&self, buffer: &mut BytesMut) {
        buffer.put_i32(self.pid);
        buffer.put_u64(self.address);
        buffer.put_u32(self.pages);
    }

    /// Reads one from the front of `buffer`; `None` if it is not all there.
    pub fn take(buffer: &mut BytesMut) -> Result<Option<Self>, WireError> {
        if buffer.len() < QUESTION_BYTES {
            return Ok(None);
        }
        let question = Self { pid: buffer.get_i32(), address: buffer.get_u64(), pages: buffer.get_u32() };
        if question == Self::DONE {
            return Ok(Some(question));
        }
        if !(1..=MAX_PAGES).contains(&question.pages) {
            return Err(WireError::Pages(question.pages, question.address));
        }
        if !question.address.is_multiple_of(PAGE_BYTES) {
            return Err(WireError::Address(question.address));
        }
        Ok(Some(question))
    }
}

/// Puts answers together from what comes.
#[derive(Debug, Default)]
pub struct Answers {
    buffer: BytesMut,
    head: Option<Question>,
}

impl Answers {
    /// Takes what came.
    pub fn push(&mut self, data: &[u8]) {
        self.buffer.extend_from_slice(data);
    }

    /// The next answer, once it is all there.
    pub fn take(&mut self) -> Result<Option<(Question, Bytes)>, WireError> {
        let head = match self.head.take() {
            Some(head) => head,
            None => match Question::take(&mut self.buffer)? {
                Some(head) => head,
                None => return Ok(None),
            },
        };
        if self.buffer.len() < head.bytes() {
            self.head = Some(head);
            return Ok(None);
        }
        Ok(Some((head, self.buffer.split_to(head.bytes()).freeze())))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn answers_come_out_as_they_went_in_however_they_are_cut(
            questions in proptest::collection::vec((1..100_i32, 0..1_u64 << 35, 1..4_u32), 0..8),
            cut in 1..9000_usize,
        ) {
            let mut stream = BytesMut::new();
            let mut sent = Vec::new();
            for (place, (pid, page, pages)) in questions.into_iter().enumerate() {
                let question = Question { pid, address: page * PAGE_BYTES, pages };
                let content = vec![place as u8; question.bytes()];
                question.put(&mut stream);
                stream.extend_from_slice(&content);
                sent.push((question, Bytes::from(content)));
            }
            Question::DONE.put(&mut stream);
            sent.push((Question::DONE, Bytes::new()));
            let (mut answers, mut came) = (Answers::default(), Vec::new());
            for chunk in stream.chunks(cut) {
                answers.push(chunk);
                while let Some(answer) = answers.take().unwrap() {
                    came.push(answer);
                }
            }
            prop_assert_eq!(came, sent);
        }
    }

    #[test]
    fn questions_that_make_no_sense_are_refused() {
        for (question, error) in [
            (Question { pid: 5, address: 4096, pages: 0 }, WireError::Pages(0, 4096)),
            (Question { pid: 5, address: 4096, pages: MAX_PAGES + 1 }, WireError::Pages(MAX_PAGES + 1, 4096)),
            (Question { pid: 5, address: 4097, pages: 1 }, WireError::Address(4097)),
        ] {
            let mut buffer = BytesMut::new();
            question.put(&mut buffer);
            assert_eq!(Question::take(&mut buffer), Err(error));
        }
    }
}
