//! Text of ids that come one at a time.

use super::super::DataError;
use super::Tokenizer;

/// Gives out text as soon as it is whole: tokens of bytes may end inside of a character.
#[derive(Debug)]
pub struct DecodeStream<'t> {
    tokenizer: &'t Tokenizer,
    /// Ids from the last place on where decoding may begin.
    ids: Vec<u32>,
    /// How many of `ids` have been given out.
    shown: usize,
}

impl<'t> DecodeStream<'t> {
    pub(super) fn new(tokenizer: &'t Tokenizer) -> Self {
        Self {
            tokenizer,
            ids: Vec::new(),
            shown: 0,
        }
    }

    /// The text that `id` completes; empty while a character is not whole. Special tokens have none.
    ///
    /// # Errors
    /// [`DataError::Token`] for an id the tokenizer does not have.
    pub fn push(&mut self, id: u32) -> Result<String, DataError> {
        self.ids.push(id);
        let (before, all) = self.texts()?;
        // A token may also be the replacement character itself: that comes with the next one.
        if all.ends_with('\u{fffd}') {
            return Ok(String::new());
        }
        let new = all.get(before.len()..).unwrap_or_default().to_owned();
        // What a token becomes may depend on the one before it, so that stays.
        self.ids.drain(..self.shown);
        self.shown = self.ids.len();
        Ok(new)
    }

    /// What is left, though a character may not be whole.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`] when the tokenizer cannot decode it.
    pub fn finish(self) -> Result<String, DataError> {
        let (before, all) = self.texts()?;
        Ok(all.get(before.len()..).unwrap_or_default().to_owned())
    }

    fn texts(&self) -> Result<(String, String), DataError> {
        let before = self.tokenizer.decode(&self.ids[..self.shown])?;
        Ok((before, self.tokenizer.decode(&self.ids)?))
    }
}
