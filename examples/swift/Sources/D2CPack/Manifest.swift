import Foundation

/// `manifest.json`: what a pack holds, by d2c_mlx/packs/manifest.py.
struct Manifest {
    struct Listed {
        let nBytes: Int
        let sha256: String
    }

    static let compactFile = "compact.safetensors"
    static let versions = ["plain": 1, "compact": 2]

    let isCompact: Bool
    let model: String
    /// Task -> directory, or position in the compact file; null is the base model.
    let tasks: [String: JSON]
    let files: [String: Listed]
    /// Of a compact pack: blocks of the base model, and what its activations are in.
    let nLayers: Int
    let dtype: Tensor.DType

    init(_ content: [String: JSON]) throws {
        var problems = Problems()
        func need(_ good: Bool, _ what: String) { problems.need(good, "\(what); write the pack again") }
        let storage = content["storage"]?.string ?? ""
        need(
            content["format"]?.string == "d2c-mlx-pack" && Self.versions[storage] != nil
                && content["format_version"]?.int == Self.versions[storage],
            "expected format 'd2c-mlx-pack', storage plain in version 1 or compact in version 2")
        try problems.check()
        isCompact = storage == "compact"
        let base = content["base"]?.object ?? [:]
        let weights = base["weights_sha256"] ?? .null
        need(
            base["model"]?.string != nil && base["config_sha256"]?.string != nil
                && (weights == .null || weights.string != nil), "base: expected model and hashes")
        model = base["model"]?.string ?? ""
        let budget = content["budget"]?.object ?? [:]
        need(
            budget["text"]?.string != nil
                && (budget["nbytes"] == .null || budget["nbytes"]?.int ?? 0 > 0),
            "budget: expected a text and a number of bytes or null")
        for (key, value) in content where ["origins", "systems", "merged"].contains(key) {
            let good = value.object?.values.allSatisfy {
                key == "merged" ? $0.int != nil : $0.string != nil
            }
            need(good ?? false, "\(key): expected names and \(key == "merged" ? "numbers" : "texts")")
        }
        nLayers = base["n_layers"]?.int ?? 0
        let named = content["dtype"]?.string.flatMap(Tensor.DType.init)
        need(
            !isCompact || nLayers > 0 && named != nil, "expected base.n_layers and a floating dtype")
        dtype = named ?? .float16
        let listed = try problems.collect { try Self.files(content["files"]?.object ?? [:]) }
        // Without them the rest would only repeat what is wrong.
        if listed == nil { try problems.check() }
        files = listed ?? [:]
        let (sum, over) = files.values.reduce((0, false)) {
            let (sum, over) = $0.0.addingReportingOverflow($1.nBytes)
            return (sum, over || $0.1)
        }
        need(!over && content["nbytes"]?.int == sum, "nbytes: expected \(sum)")
        tasks = content["tasks"]?.object ?? [:]
        need(!tasks.isEmpty, "tasks: expected one or more")
        for (task, adapter) in tasks.sorted(by: { $0.key < $1.key }) {
            need(isPrintable(task), "tasks: the name \(shown(task)) is not printable")
            let good = isCompact
                ? adapter == .null || adapter.int ?? -1 >= 0 : adapter.string.map(isListed) ?? false
            need(good, "task \(shown(task)) points to no adapter of the pack")
        }
        need(!isCompact || files[Self.compactFile] != nil, "\(Self.compactFile) is not listed")
        try problems.check()
    }

    private func isListed(_ folder: String) -> Bool {
        isInside(folder, depth: 1)
            && ["adapters.safetensors", "adapter_config.json"].allSatisfy { files["\(folder)/\($0)"] != nil }
    }

    private static func files(_ entries: [String: JSON]) throws -> [String: Listed] {
        var (found, problems): ([String: Listed], Problems) = ([:], Problems())
        for (name, entry) in entries.sorted(by: { $0.key < $1.key }) {
            let (nBytes, sha256) = (entry.object?["nbytes"]?.int ?? -1, entry.object?["sha256"]?.string)
            problems.need(
                isInside(name, depth: 2) && nBytes >= 0 && sha256 != nil,
                "files: \(shown(name)) is no file of a pack; write the pack again")
            found[name] = Listed(nBytes: nBytes, sha256: sha256 ?? "")
        }
        try problems.check()
        return found
    }
}

/// True if a name is a relative path of at most `depth` parts that stays in the pack.
func isInside(_ name: String, depth: Int) -> Bool {
    // By bytes, as the file system sees it.
    let parts = split(name, at: "/")
    return isPrintable(name) && parts.count <= depth
        && parts.allSatisfy { !["", ".", ".."].contains($0) && $0.utf8.count <= 255 }
}

/// True if a text has nothing that moves a cursor or hides; of spaces only the plain one.
func isPrintable(_ text: String) -> Bool {
    text.unicodeScalars.allSatisfy { scalar in
        switch scalar.properties.generalCategory {
        case .control, .format, .surrogate, .privateUse, .unassigned, .lineSeparator,
            .paragraphSeparator:
            return false
        case .spaceSeparator: return scalar == " "
        default: return true
        }
    }
}
