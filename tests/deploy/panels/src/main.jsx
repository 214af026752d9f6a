// Draws one of our dashboards with Grafana's own panels, from a Prometheus: ?board=NAME&minutes=N&policy=A|B
import React from 'react'
import { createRoot } from 'react-dom/client'
import { applyFieldOverrides, createTheme, dateTime, FieldType, getDisplayProcessor, ThemeContext } from '@grafana/data'
import { BigValue, BigValueColorMode, BigValueGraphMode, GlobalStyles, PanelChrome, TimeSeries } from '@grafana/ui'

const theme = createTheme({ colors: { mode: 'dark' } })
const asked = new URLSearchParams(location.search)
const end = Math.floor(Number(asked.get('end') || Date.now() / 1000))
const start = end - 60 * Number(asked.get('minutes') || 15)
const step = Math.max(3, Math.round((end - start) / 240))
const WIDTH = 1500, ROW = 34, GAP = 8
const servers = []

// Addresses of a test's servers, as a reader knows them.
const named = (text) => text.replace(/127\.0\.0\.1:\d+/g, (address) => {
  if (!servers.includes(address)) servers.push(address)
  return `equipoise-${[...servers].sort().indexOf(address)}`
})
const chosen = (expression) => expression.replaceAll('$__rate_interval', '1m')
  .replaceAll('$policy', asked.get('policy') || '.*').replace(/\$\{?\w+\}?/g, '.*')

async function ask(target) {
  const query = encodeURIComponent(chosen(target.expr))
  const url = target.instant ? `/api/v1/query?query=${query}&time=${end}`
    : `/api/v1/query_range?query=${query}&start=${start}&end=${end}&step=${step}`
  const answer = await (await fetch(url)).json()
  return answer.data.result.map((series) => ({ ...series, target }))
}

function legend({ target, metric }) {
  const format = target.legendFormat
  if (!format) return named(Object.entries(metric).map(([name, value]) => `${name}=${value}`).join(' '))
  return named(format.replace(/{{\s*(\w+)\s*}}/g, (_, name) => metric[name] ?? ''))
}

const withOverrides = (frames, panel) => applyFieldOverrides({
  data: frames, fieldConfig: { defaults: panel.fieldConfig.defaults, overrides: [] },
  fieldConfigRegistry: { getIfExists: () => undefined, list: () => [] }, replaceVariables: (text) => text, theme, timeZone: 'utc',
})

// The options of a field that the registry of a whole Grafana would fill in.
function configOf(panel, name) {
  const { custom, ...defaults } = panel.fieldConfig.defaults
  return { ...defaults, displayNameFromDS: name, custom: {
    drawStyle: 'line', lineInterpolation: 'linear', axisPlacement: 'auto', showPoints: 'never', spanNulls: false,
    gradientMode: 'none', hideFrom: {}, pointSize: 3, ...custom } }
}

function frameOf(series, panel) {
  const times = [], values = []
  const known = new Map(series.values.map(([time, value]) => [Math.round(time), value === 'NaN' ? null : Number(value)]))
  for (let time = start; time <= end; time += step) { times.push(time * 1000); values.push(known.get(time) ?? null) }
  const name = legend(series)
  return { length: times.length, refId: series.target.refId, fields: [
    { name: 'Time', type: FieldType.time, config: {}, values: times },
    { name, type: FieldType.number, config: configOf(panel, name), values, labels: {}, state: {} },
  ] }
}

function Lines({ panel, found, width, height }) {
  const frames = found.map((series) => frameOf(series, panel))
  const palette = theme.visualization.palette
  frames.forEach((frame, place) => {
    const field = frame.fields[1]
    field.config.color = { mode: 'fixed', fixedColor: palette[place % palette.length] }
    field.state = { seriesIndex: place, displayName: field.name }
    for (const each of frame.fields) each.display = getDisplayProcessor({ field: each, theme, timeZone: 'utc' })
    const custom = field.config.custom
    if (custom.stacking?.mode === 'normal') custom.stacking = { mode: 'normal', group: 'A' }
  })
  const range = { from: dateTime(start * 1000), to: dateTime(end * 1000), raw: { from: '', to: '' } }
  return <TimeSeries frames={frames} legend={panel.options.legend} timeRange={range} timeZone="utc" width={width}
    height={height} structureRev={1} replaceVariables={(text) => text} dataLinkPostProcessor={(link) => link} />
}

function Values({ panel, found, width, height }) {
  const each = width / Math.max(1, found.length)
  return <div style={{ display: 'flex' }}>{found.map((series, place) => {
    const frame = frameOf(series, panel), field = frame.fields[1]
    const display = getDisplayProcessor({ field, theme, timeZone: 'utc' })
    const last = field.values.filter((value) => value !== null && !Number.isNaN(value)).at(-1)
    const value = { ...display(last ?? NaN), title: found.length > 1 ? field.name : undefined }
    return <BigValue key={place} theme={theme} value={value} width={each} height={height}
      sparkline={{ y: { ...field, display, config: { ...field.config, custom: {} } }, x: frame.fields[0] }}
      colorMode={BigValueColorMode.Value} graphMode={BigValueGraphMode.Area} textMode={found.length > 1 ? 'value_and_name' : 'value'} />
  })}</div>
}

function Rows({ panel, found, height }) {
  const labels = [...new Set(found.flatMap((series) => Object.keys(series.metric)))].filter((name) => name !== '__name__')
  const cell = { padding: '3px 10px', textAlign: 'left', borderBottom: `1px solid ${theme.colors.border.weak}` }
  const lines = found.map((series) => labels.map((name) => named(series.metric[name] ?? ''))).sort((a, b) => a.join() < b.join() ? -1 : 1)
  return <div style={{ height, overflow: 'hidden' }}><table style={{ width: '100%', fontSize: 12, borderCollapse: 'collapse' }}>
    <thead><tr>{labels.map((name) => <th key={name} style={{ ...cell, color: theme.colors.primary.text }}>{name}</th>)}</tr></thead>
    <tbody>{lines.map((line, place) => <tr key={place}>{line.map((text, at) => <td key={at} style={cell}>{text}</td>)}</tr>)}</tbody>
  </table></div>
}

const DRAWN = { timeseries: Lines, stat: Values, table: Rows }

function Panel({ panel, drawn }) {
  const [found, set] = React.useState(null)
  React.useEffect(() => {
    Promise.all(panel.targets.map(ask)).then((answers) => set(answers.flat())).finally(drawn)
  }, [])
  const { x, y, w, h } = panel.gridPos
  const width = w * WIDTH / 24 - GAP, height = h * ROW - GAP
  const Draw = DRAWN[panel.type]
  return <div style={{ position: 'absolute', left: x * WIDTH / 24 + GAP / 2, top: y * ROW + GAP }}>
    <PanelChrome title={panel.title} description={panel.description} width={width} height={height}>
      {(inner, tall) => found === null ? <div /> : found.length ? <Draw panel={panel} found={found} width={inner} height={tall} />
        : <div style={{ textAlign: 'center', paddingTop: tall / 3, color: theme.colors.text.secondary }}>{panel.fieldConfig.defaults.noValue || 'No data'}</div>}
    </PanelChrome>
  </div>
}

function Board({ board }) {
  const panels = board.panels.filter((panel) => panel.type !== 'row')
  const left = React.useRef(panels.length)
  const drawn = () => { if (--left.current === 0) setTimeout(() => { document.title = 'drawn' }, 1500) }
  const last = Math.max(...panels.map((panel) => panel.gridPos.y + panel.gridPos.h))
  document.body.dataset.height = last * ROW + 2 * GAP
  return <div style={{ position: 'relative', width: WIDTH, height: last * ROW + GAP, color: theme.colors.text.primary, fontFamily: theme.typography.fontFamily }}>
    {board.panels.filter((panel) => panel.type === 'row').map((row) => <div key={row.title} style={{ position: 'absolute', top: row.gridPos.y * ROW + 13, left: 12, fontSize: 15, fontWeight: 500 }}>⌄ {row.title}</div>)}
    {panels.map((panel, place) => <Panel key={place} panel={panel} drawn={drawn} />)}
  </div>
}

const board = await (await fetch(`/dashboards/${asked.get('board')}.json`)).json()
await ask({ expr: 'equipoise_server_build_info', instant: true }).then((found) => found.forEach((each) => named(each.metric.instance)))
await document.fonts.ready
createRoot(document.getElementById('root')).render(<ThemeContext.Provider value={theme}><GlobalStyles /><Board board={board} /></ThemeContext.Provider>)
