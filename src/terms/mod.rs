//! The words that all layers share: one type for each, with its serde form, its text and its reading.
//!
//! It is a leaf, so that the model, the protocol, the allocator, the servers and the command line can say the same thing by the
//! same name: what one of them hands to another needs no translation, and a new value of a word is added in one place.
//!
//! | file | words |
//! |---|---|
//! | `tensor` | how numbers travel, and a tensor that has come |
//! | `adapter`, `aggregation` | the shape of an adapter's matrices, and how clients' adapters become one |
//! | `format` | how frozen weights are held |
//! | `optimizer` | AdamW's settings and its learning rate |
//! | `moments` | what AdamW keeps, and what becomes of it |
//! | `speed` | what a device computes in a second |
//! | `phases` | the parts of a client's step |
//! | `ids` | clients, runs, rounds and steps |

pub mod adapter;
pub mod aggregation;
pub mod format;
pub mod ids;
pub mod moments;
pub mod optimizer;
pub mod phases;
pub mod speed;
pub mod tensor;

/// A text that is none of a word's values.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is none of {}", .values.join(", "))]
pub struct UnknownWord {
    /// What was given.
    pub text: String,
    /// What would do.
    pub values: &'static [&'static str],
}

/// Gives an enum without data its texts: `ALL` and `name`, `Display`, `FromStr`, and serde by the same texts.
macro_rules! words {
    ($name:ident { $($variant:ident = $text:literal),* $(,)? }) => {
        impl $name {
            /// Every value, in the order of the declaration.
            pub const ALL: &[$name] = &[$($name::$variant),*];

            /// The text, as options, files and logs have it.
            pub fn name(self) -> &'static str {
                match self { $($name::$variant => $text),* }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(self.name())
            }
        }

        impl std::str::FromStr for $name {
            type Err = $crate::terms::UnknownWord;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                match text {
                    $($text => Ok($name::$variant),)*
                    _ => Err($crate::terms::UnknownWord { text: text.to_owned(), values: &[$($text),*] }),
                }
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.name())
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                <String as serde::Deserialize>::deserialize(deserializer)?
                    .parse()
                    .map_err(serde::de::Error::custom)
            }
        }
    };
}
use words;
