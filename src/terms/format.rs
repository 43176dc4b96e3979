//! How frozen weights are held: on a device, in a file of the model's parts, and on their way to a client.
//!
//! It is one word for the files, the devices and the assignment, because a client holds what the server hands out.

use super::words;

/// How frozen matrices are held. Biases and layer norms are always f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Format {
    #[default]
    F16,
    F32,
}

words!(Format { F16 = "f16", F32 = "f32" });

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_format_is_read_and_written_by_its_name() {
        for &format in Format::ALL {
            assert_eq!(format.to_string().parse(), Ok(format));
            let json = serde_json::to_string(&format).unwrap();
            assert_eq!(json, format!("\"{format}\""));
            assert_eq!(serde_json::from_str::<Format>(&json).unwrap(), format);
        }
        assert_eq!(Format::default(), Format::F16);
        let error = "F16".parse::<Format>().unwrap_err();
        assert_eq!(error.to_string(), "`F16` is none of f16, f32");
    }
}
