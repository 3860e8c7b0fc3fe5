//! What VMs that go on from captured states have shown of their identities: a table of meta. None of it may come twice,
//! whichever host process saw it.

use burgeon_api::{
    Error, Result, VmId,
    receipt::{KeptReceipt, Receipt},
};

use crate::{
    meta::{Meta, from_json, to_json},
    sql::{Connection, Row},
};

pub(crate) const MIGRATION: &str = "
    CREATE TABLE receipt (
        generation TEXT PRIMARY KEY,
        vm TEXT NOT NULL,
        name TEXT NOT NULL,
        sample TEXT NOT NULL,
        boot_id TEXT,
        ssh_host_key TEXT,
        machine_id TEXT,
        given_us INTEGER NOT NULL,
        receipt TEXT NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX receipt_vm ON receipt (vm);
    CREATE INDEX receipt_name ON receipt (name);
    CREATE INDEX receipt_given ON receipt (given_us);
    CREATE UNIQUE INDEX receipt_sample ON receipt (sample);
    CREATE UNIQUE INDEX receipt_boot_id ON receipt (boot_id);
    CREATE UNIQUE INDEX receipt_ssh_host_key ON receipt (ssh_host_key);
";

/// Receipts of VMs that were removed are kept as long as there are no more than this.
const MOST: u64 = 100_000;

impl Meta {
    /// Keeps receipts. One that is kept already stays; of one that shows what another has shown nothing is kept, and it is
    /// told.
    ///
    /// # Errors
    /// The database's.
    pub async fn keep_receipts(&self, shown: Vec<KeptReceipt>) -> Result<Vec<(VmId, Error)>> {
        self.keep_receipts_within(MOST, shown).await
    }

    async fn keep_receipts_within(&self, most: u64, shown: Vec<KeptReceipt>) -> Result<Vec<(VmId, Error)>> {
        self.database
            .write("keep receipts", move |connection| {
                let mut repeats = Vec::new();
                for one in &shown {
                    match admit(connection, one)? {
                        Admitted::New => insert(connection, one)?,
                        Admitted::Known => {}
                        Admitted::Repeats(error) => repeats.push((one.vm, error)),
                    }
                }
                let count = connection.query("SELECT COUNT(*) FROM receipt", &[])?;
                let count = count.first().map_or(Ok(0), |row| row.unsigned(0))?;
                if count > most {
                    connection.execute(
                        "DELETE FROM receipt WHERE generation IN (SELECT generation FROM receipt
                         WHERE vm NOT IN (SELECT id FROM vm) ORDER BY given_us, generation LIMIT $1)",
                        &[(count - most).into()],
                    )?;
                }
                Ok(repeats)
            })
            .await
    }

    /// What a VM has shown, oldest first, by its id or name; it may have been removed.
    ///
    /// # Errors
    /// `Damaged` for a row that does not read.
    pub async fn receipts(&self, vm: &str) -> Result<Vec<KeptReceipt>> {
        let key = vm.to_string();
        self.database
            .read("list receipts", move |connection| {
                let sql =
                    "SELECT vm, name, receipt FROM receipt WHERE vm = $1 OR name = $1 ORDER BY given_us, generation";
                let rows = connection.query(sql, &[key.as_str().into()])?;
                rows.iter().map(read).collect()
            })
            .await
    }
}

enum Admitted {
    New,
    Known,
    Repeats(Error),
}

fn admit(connection: &mut Connection, one: &KeptReceipt) -> Result<Admitted> {
    let KeptReceipt { vm, receipt, .. } = one;
    let Receipt { generation, sample, .. } = receipt;
    let known = connection
        .query_first("SELECT vm, sample FROM receipt WHERE generation = $1", &[generation.as_str().into()])?;
    if let Some(row) = &known
        && row.text(0)? == vm.to_string()
        && row.text(1)? == sample
    {
        return Ok(Admitted::Known);
    }
    let own = [
        ("generation", "generation", Some(generation)),
        ("random bytes", "sample", Some(sample)),
        ("boot id", "boot_id", known_of(&receipt.boot_id)),
        ("SSH host key", "ssh_host_key", receipt.ssh_host_key.as_ref()),
    ];
    for (what, column, value) in own {
        let Some(value) = value else { continue };
        let sql = format!("SELECT vm, name FROM receipt WHERE {column} = $1");
        if let Some(row) = connection.query_first(&sql, &[value.as_str().into()])? {
            let (id, name) = (row.text(0)?, row.text(1)?);
            return Ok(Admitted::Repeats(Error::damaged(format!(
                "the guest's receipt is not good: its {what} {value} is what VM {name} ({id}) has shown"
            ))));
        }
    }
    Ok(Admitted::New)
}

/// What a guest has none of differs from nobody's.
fn known_of(value: &String) -> Option<&String> {
    Some(value).filter(|value| !value.is_empty())
}

fn insert(connection: &mut Connection, one: &KeptReceipt) -> Result<()> {
    let receipt = &one.receipt;
    connection.execute(
        "INSERT INTO receipt VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
        &[
            receipt.generation.as_str().into(),
            one.vm.to_string().into(),
            one.name.as_str().into(),
            receipt.sample.as_str().into(),
            known_of(&receipt.boot_id).cloned().into(),
            receipt.ssh_host_key.clone().into(),
            known_of(&receipt.machine_id).cloned().into(),
            receipt.given_us.max(receipt.given_s.saturating_mul(1_000_000)).into(),
            to_json(receipt).into(),
        ],
    )?;
    Ok(())
}

fn read(row: &Row) -> Result<KeptReceipt> {
    Ok(KeptReceipt { vm: row.text(0)?.parse()?, name: row.text(1)?.into(), receipt: from_json(row.text(2)?)? })
}

#[cfg(test)]
mod tests {
    use burgeon_api::profile::Profile;

    use super::*;
    use crate::meta::VmRow;

    #[tokio::test]
    async fn the_oldest_of_removed_vms_go_first() {
        let directory = tempfile::tempdir().unwrap();
        let meta = Meta::open(directory.path().join("meta.db").as_path()).unwrap();
        let row = VmRow::new(VmId::generate(), "web".into(), "tiny".into(), Profile::default(), 5);
        let there = meta.create_vm(row).await.unwrap().id;
        let gone = VmId::generate();
        let shown = |vm: VmId, number: u64| KeptReceipt {
            vm,
            name: if vm == there { "web".into() } else { "gone".into() },
            receipt: Receipt {
                generation: format!("g{number}"),
                sample: format!("s{number}"),
                given_s: number,
                ..Receipt::default()
            },
        };
        let all = vec![shown(there, 1), shown(gone, 2), shown(gone, 3), shown(gone, 4)];
        assert!(meta.keep_receipts_within(3, all).await.unwrap().is_empty());
        let left = |all: Vec<KeptReceipt>| all.into_iter().map(|one| one.receipt.given_s).collect::<Vec<_>>();
        assert_eq!(left(meta.receipts("gone").await.unwrap()), [3, 4]);
        assert!(meta.keep_receipts_within(1, vec![shown(there, 5)]).await.unwrap().is_empty());
        assert_eq!(left(meta.receipts("gone").await.unwrap()), [0; 0]);
        assert_eq!(left(meta.receipts(&there.to_string()).await.unwrap()), [1, 5], "of a VM that is there all stay");
    }
}
