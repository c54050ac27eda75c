//! The layer parameters, as the extension of caffe.proto writes them on the
//! wire (`caffe_patch/caffe_proto_*.patch` hold the C++ side).
//!
//! Caffe hands a layer's parameter over as the serialized sub-message. Fields
//! that only C++ reads, the fillers, are left out here; prost skips them.

use crate::error::{Error, Result};
use prost::Message;

/// `LargeMarginInnerProductParameter`.
#[derive(Clone, PartialEq, Message)]
pub struct LargeMarginInnerProductParameter {
    /// Number of classes N.
    #[prost(uint32, optional, tag = "1")]
    pub num_output: Option<u32>,
    /// The margin m by the name that the original layer gave it.
    #[prost(
        enumeration = "LargeMarginType",
        optional,
        tag = "2",
        default = "Single"
    )]
    pub r#type: Option<i32>,
    /// First axis of the features; those before it count samples.
    #[prost(int32, optional, tag = "4", default = "1")]
    pub axis: Option<i32>,
    /// lambda at iteration 0.
    #[prost(float, optional, tag = "5", default = "1")]
    pub base: Option<f32>,
    /// How fast lambda falls: the factor of the iteration.
    #[prost(float, optional, tag = "6", default = "0")]
    pub gamma: Option<f32>,
    /// How fast lambda falls: the exponent.
    #[prost(float, optional, tag = "7", default = "1")]
    pub power: Option<f32>,
    /// Forward passes that lambda has behind it at the start, as a user wrote
    /// it; nothing here ever writes it.
    #[prost(int32, optional, tag = "8", default = "0")]
    pub iteration: Option<i32>,
    /// lambda never falls below this.
    #[prost(float, optional, tag = "9", default = "0")]
    pub lambda_min: Option<f32>,
    /// The margin m as a number; overrides `type`.
    #[prost(uint32, optional, tag = "10")]
    pub margin: Option<u32>,
    /// Samples of this label get the plain inner product.
    #[prost(int32, optional, tag = "11")]
    pub ignore_label: Option<i32>,
    /// All the forward passes behind the layer, as a snapshot wrote it.
    #[prost(int64, optional, tag = "12", default = "0")]
    pub passes: Option<i64>,
}

/// `LargeMarginInnerProductParameter.LargeMarginType`: m from 1 to 4.
#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub enum LargeMarginType {
    /// m = 1, no margin.
    Single = 0,
    /// m = 2.
    Double = 1,
    /// m = 3.
    Triple = 2,
    /// m = 4.
    Quadruple = 3,
}

impl LargeMarginInnerProductParameter {
    /// The margin m: `margin` where it is set, else the one that `type` names.
    ///
    /// # Errors
    /// A `type` that this version does not know.
    pub fn angular_margin(&self) -> Result<u32> {
        if let Some(m) = self.margin {
            return Ok(m);
        }
        // prost's getter would read an unknown number as the default.
        let raw = self.r#type.unwrap_or(LargeMarginType::Single as i32);
        match LargeMarginType::try_from(raw) {
            Ok(LargeMarginType::Single) => Ok(1),
            Ok(LargeMarginType::Double) => Ok(2),
            Ok(LargeMarginType::Triple) => Ok(3),
            Ok(LargeMarginType::Quadruple) => Ok(4),
            Err(_) => Err(Error::new(format!(
                "type: {raw} is none of SINGLE (0), DOUBLE (1), TRIPLE (2), QUADRUPLE (3)"
            ))),
        }
    }
}

/// `BNParameter`.
#[derive(Clone, PartialEq, Message)]
pub struct BnParameter {
    /// Weight of the old value in the moving statistics.
    #[prost(float, optional, tag = "3", default = "0.9")]
    pub momentum: Option<f32>,
    /// Added to the variance.
    #[prost(float, optional, tag = "4", default = "1e-5")]
    pub eps: Option<f32>,
    /// Normalise by the moving statistics in the TRAIN phase too.
    #[prost(bool, optional, tag = "5", default = "false")]
    pub frozen: Option<bool>,
}

/// Decodes one of the messages above from the bytes that protobuf wrote.
///
/// # Errors
/// Bytes that are not such a message.
pub fn decode<P: Message + Default>(bytes: &[u8]) -> Result<P> {
    P::decode(bytes).map_err(|e| Error::new(format!("cannot read the layer's parameter: {e}")))
}

/// `value` if it is finite and at least 0.
pub(crate) fn finite_non_negative(field: &str, value: f32) -> Result<f64> {
    if value.is_finite() && value >= 0.0 {
        Ok(f64::from(value))
    } else {
        Err(Error::new(format!(
            "{field}: {value} must be a finite number, 0 or more"
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_message_reads_as_the_proto_defaults() {
        let p: LargeMarginInnerProductParameter = decode(&[]).unwrap();
        assert_eq!((p.num_output, p.axis()), (None, 1));
        assert_eq!((p.base(), p.gamma(), p.power()), (1.0, 0.0, 1.0));
        assert_eq!((p.iteration(), p.passes(), p.lambda_min()), (0, 0, 0.0));
        assert_eq!(p.angular_margin(), Ok(1));
        let p: BnParameter = decode(&[]).unwrap();
        assert_eq!((p.momentum(), p.eps(), p.frozen()), (0.9, 1e-5, false));
    }

    #[test]
    fn wire_numbers_are_those_of_the_original_layer() {
        // num_output: 10, type: QUADRUPLE, weight_filler { type: "xavier" },
        // base: 1000, iteration: 7, by hand from the protobuf wire format.
        let mut bytes = vec![0x08, 10, 0x10, 3, 0x1a, 8, 0x0a, 6];
        bytes.extend(b"xavier");
        bytes.push(0x2d);
        bytes.extend(1000f32.to_le_bytes());
        bytes.extend([0x40, 7]);
        let p: LargeMarginInnerProductParameter = decode(&bytes).unwrap();
        assert_eq!(p.num_output, Some(10));
        assert_eq!(p.angular_margin(), Ok(4));
        assert_eq!((p.base(), p.iteration()), (1000.0, 7));
    }

    #[test]
    fn margin_overrides_type_and_an_unknown_type_is_refused() {
        let mut p = LargeMarginInnerProductParameter {
            r#type: Some(1),
            margin: Some(6),
            ..Default::default()
        };
        assert_eq!(p.angular_margin(), Ok(6));
        p.margin = None;
        p.r#type = Some(9);
        let message = p.angular_margin().unwrap_err().to_string();
        assert!(message.contains("type: 9"), "{message}");
    }

    #[test]
    fn bytes_that_are_no_message_are_an_error() {
        assert!(decode::<BnParameter>(&[0xff, 0xff]).is_err());
    }
}
