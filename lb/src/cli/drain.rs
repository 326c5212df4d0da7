//! `lb drain` and `lb undrain`.

use http::Method;

use super::{ClientError, DrainArgs};
use crate::client::AdminClient;
use crate::control::BackendView;

pub(super) async fn command(args: &DrainArgs, drain: bool) -> Result<(), ClientError> {
    let client = AdminClient::new(&args.admin.admin)?;
    let verb = if drain { "drain" } else { "undrain" };
    let path = format!("/v1/backends/{}/{verb}", args.backend);
    let _: BackendView = client.json(Method::POST, &path, None::<&()>).await?;
    Ok(())
}
